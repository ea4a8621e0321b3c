"""A registry on SQLite and, where SAMARA_TEST_POSTGRES names a server, on PostgreSQL."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy

from samara.registry.records import Audit, Description, Evaluation, Evidence, License
from samara.registry.registry import Registry

POSTGRES = "SAMARA_TEST_POSTGRES"


@pytest.fixture(params=["sqlite", "postgresql"])
def catalogue_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty catalogue."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'catalogue.sqlite'}"
        return
    server = os.environ.get(POSTGRES)
    if not server:
        pytest.skip(f"{POSTGRES} names no PostgreSQL server (`make test-postgres` starts one)")
    admin = sqlalchemy.create_engine(
        server, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    name = f"samara_{uuid.uuid4().hex}"
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    url = sqlalchemy.make_url(server).set(database=name)
    yield url.render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def open_registry(tmp_path: Path, catalogue_url: str) -> Callable[[], Registry]:
    """Opens the same registry anew, as another process would."""
    return lambda: Registry.open(str(tmp_path / "store"), catalogue_url=catalogue_url)


@pytest.fixture
def registry(open_registry: Callable[[], Registry]) -> Registry:
    return open_registry()


@pytest.fixture
def add(registry: Registry, tmp_path: Path):
    """Add a version with a given text for content and a given accuracy."""

    def one(text: str, *, accuracy: float | None = None, n: int = 1000, line="line", **more):
        source = tmp_path / f"source-{uuid.uuid4().hex}"
        source.mkdir()
        (source / "weights.safetensors").write_text(text)
        (source / "config.json").write_text("{}")
        evidence = Evidence()
        if accuracy is not None:
            evidence = evidence_of(accuracy, n)
        description = Description(
            kind="model",
            identity=more.pop("identity", f"identity-{text}"),
            evidence=evidence,
            license=more.pop("license", License(redistribution="allowed")),
            **{key: more.pop(key) for key in ("made_from", "note") if key in more},
        )
        return registry.add(line, source, description, actor="ada", **more)

    return one


def evidence_of(accuracy: float, n: int = 1000, *, bias="pass", stability="pass") -> Evidence:
    return Evidence(
        evaluations=[Evaluation(task="qa", metric="accuracy", value=accuracy, n=n)],
        audits=[
            Audit(suite="bias", verdict=bias),
            Audit(suite="stability", verdict=stability),
        ],
    )


@pytest.fixture(name="evidence_of")
def evidence_of_fixture() -> Callable[..., Evidence]:
    return evidence_of
