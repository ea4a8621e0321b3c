"""The registry's catalogue in SQL: SQLite in a file, or PostgreSQL by URL; the same statements.

Versions and log entries are only ever inserted. Every writing transaction first updates the one row
of ``state``: that takes the write lock in both databases, so writers come one after another, and
the log has one order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.exc import NoSuchModuleError as NoSuchDialectError
from sqlalchemy.pool import NullPool

from samara.errors import RegistryError
from samara.registry.audit_log import FIRST

SCHEMA = 1
LOCK_SECONDS = 30
"""How long a writer waits for another one."""

metadata = MetaData()

state = Table(
    "samara_state",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("writes", Integer, nullable=False),
    Column("log_head", String(64), nullable=False),
)
versions = Table(
    "samara_versions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("line", String(200), nullable=False),
    Column("number", Integer, nullable=False),
    Column("manifest", String(64), nullable=False),
    Column("identity", String(200), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("added_at", String(40), nullable=False),
    Column("added_by", String(200), nullable=False),
    UniqueConstraint("line", "number"),
    UniqueConstraint("line", "manifest"),
)
parents = Table(
    "samara_parents",
    metadata,
    Column("child", ForeignKey("samara_versions.id"), primary_key=True),
    Column("parent", ForeignKey("samara_versions.id"), primary_key=True),
)
evidence = Table(
    "samara_evidence",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("version", ForeignKey("samara_versions.id"), nullable=False),
    Column("content", JSON, nullable=False),
)
aliases = Table(
    "samara_aliases",
    metadata,
    Column("line", String(200), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("version", ForeignKey("samara_versions.id"), nullable=False),
    Column("revision", Integer, nullable=False),
)
gates = Table(
    "samara_gates",
    metadata,
    Column("line", String(200), primary_key=True),
    Column("alias", String(200), primary_key=True),
    Column("content", JSON, nullable=False),
)
leases = Table(
    "samara_leases",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("holder", String(40), primary_key=True),
    Column("until", Integer, nullable=False),
)
dropped = Table(
    "samara_dropped",
    metadata,
    Column("version", ForeignKey("samara_versions.id"), primary_key=True),
    Column("at", String(40), nullable=False),
)
log = Table(
    "samara_log",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", String(40), nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(40), nullable=False),
    Column("line", String(200), nullable=False),
    Column("details", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
)


def open_engine(url: str) -> Engine:
    """Connect to a catalogue, and make its tables where there are none.

    Raises:
        RegistryError: If the URL is wrong, the database cannot be reached, or its tables are of
            another version of Samara.
    """
    try:
        arguments = {"timeout": LOCK_SECONDS} if url.startswith("sqlite") else {}
        # Connections are few and short: none is kept, so none is left open.
        engine = create_engine(url, connect_args=arguments, poolclass=NullPool)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _check_foreign_keys)
        _make_tables(engine)
    except (ArgumentError, NoSuchDialectError, ModuleNotFoundError) as error:
        raise RegistryError(
            f"catalogue: {_without_password(url)} cannot be opened ({error}); give a URL such as "
            "sqlite:///file or postgresql+psycopg://user@host/name"
        ) from None
    except OperationalError as error:
        reason = str(error.orig).splitlines()[0]
        raise RegistryError(
            f"catalogue: {_without_password(url)} cannot be reached ({reason})"
        ) from None
    with engine.connect() as connection:
        found = connection.execute(select(state.c.schema_version)).scalar_one()
    if found != SCHEMA:
        raise RegistryError(
            f"catalogue: {_without_password(url)} has tables of version {found}, this version of "
            f"Samara reads {SCHEMA}"
        )
    return engine


def _check_foreign_keys(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined] # the driver's own connection
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _make_tables(engine: Engine) -> None:
    for _ in range(2):
        try:
            metadata.create_all(engine)
            break
        except (OperationalError, ProgrammingError, IntegrityError):
            continue  # another process was making them at the same moment; now they are there
    with contextlib.suppress(IntegrityError), engine.begin() as connection:
        if connection.execute(select(state.c.id)).first() is None:
            first = {"id": 1, "schema_version": SCHEMA, "writes": 0, "log_head": FIRST}
            connection.execute(insert(state).values(first))


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://…@{tail}" if at else url


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other writer runs beside.

    Raises:
        RegistryError: If another writer keeps the lock for too long.
    """
    try:
        with engine.begin() as connection:
            connection.execute(update(state).values(writes=state.c.writes + 1))
            yield connection
    except OperationalError as error:
        if "locked" in str(error.orig):
            raise RegistryError(
                f"catalogue: another process has been writing for {LOCK_SECONDS} seconds; try again"
            ) from None
        raise
