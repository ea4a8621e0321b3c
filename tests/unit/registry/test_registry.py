"""The registry: immutable versions, gated aliases, a log that shows tampering, careful gc."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import delete, text, update

from samara.errors import GateError, LicenseDenied, RegistryError
from samara.registry import registry as registry_module
from samara.registry import tables, upkeep
from samara.registry.artifacts import describe_folder
from samara.registry.config import Gates
from samara.registry.records import License
from samara.registry.registry import Override, Registry
from samara.runs import write_json

ROOT = Path(__file__).resolve().parents[3]
GATES = Gates.model_validate(
    {
        "kpis": [
            {"task": "qa", "metric": "accuracy", "bound": 0.5, "max_loss": 0.05, "is_rate": True}
        ]
    }
)


def promote(registry, reference, alias="stable", **more):
    return registry.promote("line", reference, alias=alias, actor="ada", **more)


# --- versions -----------------------------------------------------------------------------------


def test_versions_are_numbered_and_found_by_number_alias_and_hash(registry, add):
    first, second = add("one"), add("two")
    assert [version.number for version in registry.versions("line")] == [1, 2]
    promote(registry, "2", alias="candidate")
    for reference in ("2", "candidate", second.manifest[:8], "identity-two"):
        assert registry.resolve("line", reference).id == second.id
    with pytest.raises(RegistryError, match=r"line:identity-: fits 2 versions"):
        registry.resolve("line", "identity-")
    with pytest.raises(RegistryError, match=r"line:candidat: no such version \(did you mean"):
        registry.resolve("line", "candidat")
    with pytest.raises(RegistryError, match=r"lin: no such model line \(did you mean 'line'"):
        registry.resolve("lin", "1")
    assert first.name == "line:1"


def test_the_same_content_is_one_version(registry, add):
    assert add("one").id == add("one").id
    assert add("one", note="another word").number == 2
    objects = [name for name in registry.objects.names() if not name.endswith(".tmp")]
    assert len(objects) == 2 + 2  # the files once, a manifest each


def test_a_version_comes_back_file_by_file(registry, add, tmp_path):
    add("one")
    registry.fetch("line", "1", tmp_path / "out")
    assert (tmp_path / "out/weights.safetensors").read_text() == "one"
    with pytest.raises(RegistryError, match="is there already"):
        registry.fetch("line", "1", tmp_path / "out")


def test_names_and_sources_that_cannot_be_are_refused(registry, add, tmp_path):
    with pytest.raises(RegistryError, match="model line 'a:b'"):
        add("one", line="a:b")
    add("one")
    for alias in ("7", "", "a b"):
        with pytest.raises(RegistryError, match="alias"):
            promote(registry, "1", alias=alias)
    with pytest.raises(RegistryError, match="no such file or folder"):
        describe_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match="holds no weights"):
        describe_folder(tmp_path / "empty")


def test_a_licence_may_forbid_publishing(registry, add):
    closed = License(redistribution="forbidden", notice="contract 7")
    with pytest.raises(LicenseDenied, match=r"forbidden \(contract 7\); it may not be published"):
        add("one", license=closed)
    assert registry.versions() == []


def test_parents_are_named_or_recognised(registry, add):
    base = add("base", identity="weights-of-base")
    child = add("child", made_from=["weights-of-base", "unknown"])
    grown = add("grown", parents=["1", "2"])
    assert [v.id for v in registry.parents(child)] == [base.id]
    assert [v.id for v in registry.parents(grown)] == [base.id, child.id]
    with pytest.raises(RegistryError, match="no such version"):
        add("other", parents=["9"])


def test_a_run_folder_brings_its_lineage_and_scores(tmp_path):
    model = tmp_path / "run/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    identity = describe_folder(model).identity
    spent = {"tokens": 1, "flops": 1.0, "seconds": 1.0, "joules": 1.0}
    write_json(
        tmp_path / "run/lineage.json",
        {"parents": {"init_from": "abc", "data": "def"}, "spent": spent, "inherited": spent},
    )
    score = {"value": 2.0, "low": 1.9, "high": 2.1}
    models = {
        "mine": {"weights_hash": identity, "loss": score},
        "other": {"weights_hash": "x", "loss": score},
    }
    results = {"split": "test", "num_documents": 50, "models": models}
    write_json(tmp_path / "run/results.json", results)
    found = describe_folder(tmp_path / "run")
    assert (found.kind, found.identity, found.made_from) == ("run", identity, ["abc", "def"])
    row = found.evidence.evaluation("test", "loss")
    assert (row.value, row.ci, row.n) == (2.0, (1.9, 2.1), 50)
    assert len(found.evidence.evaluations) == 1


# --- aliases and gates --------------------------------------------------------------------------


def test_stable_moves_only_through_gates(registry, add):
    add("one", accuracy=0.8)
    add("worse", accuracy=0.6)
    add("unclear", accuracy=0.76)
    add("unmeasured")
    with pytest.raises(GateError, match=r"alias 'stable' has no gates yet; set them with --gates"):
        promote(registry, "1")
    assert promote(registry, "1", gates=GATES).decision.outcome == "promote"
    with pytest.raises(GateError, match=r"line:2: the gates of 'stable' say refuse \(qa accuracy"):
        promote(registry, "2")
    with pytest.raises(GateError, match=r"say hold .*; measure more, or override"):
        promote(registry, "3")
    with pytest.raises(GateError, match="not measured"):
        promote(registry, "4")
    assert registry.resolve("line", "stable").number == 1
    actions = [entry.action for entry in registry.log("line")]
    assert actions == ["add"] * 4 + ["gates", "promote", "refuse", "hold", "refuse"]


def test_more_evidence_may_let_a_version_pass(registry, add, evidence_of):
    add("one", accuracy=0.8, n=10)
    with pytest.raises(GateError, match="10 items, 100 are needed"):
        promote(registry, "1", gates=GATES)
    registry.add_evidence("line", "1", evidence_of(0.8, 1000), actor="ada")
    assert promote(registry, "1").version.number == 1


def test_a_person_may_override_and_is_on_record(registry, add):
    add("one")
    override = Override(name="Grace", reason="demo tonight")
    promote(registry, "1", gates=GATES, override=override)
    entry = registry.log("line")[-1]
    assert entry.action == "promote"
    assert entry.details["override"] == {"name": "Grace", "reason": "demo tonight"}
    assert "not measured" in entry.details["gates"]


def test_other_aliases_are_free_until_gates_are_set(registry, add):
    add("one")
    assert promote(registry, "1", alias="candidate").decision is None
    with pytest.raises(GateError):
        promote(registry, "1", alias="candidate", gates=GATES)


def test_rollback_goes_back_as_often_as_it_was_promoted(registry, add):
    for number, name in enumerate(("one", "two", "three"), start=1):
        add(name, accuracy=0.8)
        promote(registry, str(number), gates=GATES)

    def back(**more):
        return registry.rollback("line", alias="stable", actor="ada", reason="bad", **more)

    assert back().version.number == 2
    promote(registry, "3")
    with pytest.raises(RegistryError, match=r"never pointed to version 9 before; .* 1, 2"):
        back(to=9)
    assert back(to=1).version.number == 1
    with pytest.raises(RegistryError, match="alias 'stable' has nothing to go back to"):
        back()
    with pytest.raises(RegistryError, match="alias 'other' has nothing"):
        registry.rollback("line", alias="other", actor="ada", reason="bad")
    assert len(registry.versions()) == 3
    assert registry.log()[-1].details["reason"] == "bad"
    assert upkeep.verify(registry) == []


def test_two_who_promote_at_once_one_wins_the_other_is_told(
    registry, open_registry, add, monkeypatch
):
    add("one", accuracy=0.8)
    add("two", accuracy=0.8)
    both_decided, decide = threading.Barrier(2), registry_module.decide

    def decide_together(*arguments):
        found = decide(*arguments)
        both_decided.wait(timeout=20)  # neither has written, both saw the same alias
        return found

    registry._set_gates("line", "stable", GATES, actor="ada")
    monkeypatch.setattr(registry_module, "decide", decide_together)
    outcomes = {}

    def work(reference):
        try:
            promote(open_registry(), reference)
            outcomes[reference] = "won"
        except RegistryError as error:
            outcomes[reference] = str(error)

    threads = [threading.Thread(target=work, args=(reference,)) for reference in ("1", "2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = next(reference for reference, outcome in outcomes.items() if outcome == "won")
    loser = outcomes["1" if winner == "2" else "2"]
    assert f"alias 'stable' was moved to version {winner} by somebody else" in loser
    assert registry.resolve("line", "stable").number == int(winner)
    assert upkeep.verify(registry) == []


def test_evidence_that_comes_in_between_counts(registry, add, evidence_of, monkeypatch):
    add("one", accuracy=0.8)
    decide = registry_module.decide

    def decide_late(*arguments):
        found = decide(*arguments)
        registry.add_evidence("line", "1", evidence_of(0.2, bias="fail"), actor="grace")
        return found

    monkeypatch.setattr(registry_module, "decide", decide_late)
    with pytest.raises(RegistryError, match="its evidence or the gates were changed by somebody"):
        promote(registry, "1", gates=GATES)
    assert registry.aliases() == []


def _write_versions(location: str, url: str, name: str) -> None:
    from samara.registry.records import Description

    registry = Registry.open(location, catalogue_url=url)
    for number in range(5):
        source = Path(location) / f"{name}-{number}.safetensors"
        source.write_text(f"{name} {number}")
        description = Description(kind="model", identity=f"{name}-{number}")
        version = registry.add("line", source, description, actor=name)
        registry.promote("line", str(version.number), alias=name, actor=name)


def test_processes_that_write_at_once_make_one_unbroken_log(registry, tmp_path, catalogue_url):
    context = multiprocessing.get_context("spawn")
    location = str(tmp_path / "store")
    workers = [
        context.Process(target=_write_versions, args=(location, catalogue_url, name))
        for name in ("ada", "grace")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(version.number for version in registry.versions("line")) == list(range(1, 11))
    assert [entry.number for entry in registry.log()] == list(range(1, 21))
    assert upkeep.verify(registry, full=True) == []


def test_a_killed_addition_leaves_no_version(registry, tmp_path, catalogue_url, open_registry):
    """Killed between its objects and its version: nothing to see, and gc sweeps up."""
    source = tmp_path / "one.safetensors"
    source.write_text("one")
    code = f"""
import os, signal
from pathlib import Path
from samara.registry.records import Description
from samara.registry.registry import Registry
registry = Registry.open({str(tmp_path / "store")!r}, catalogue_url={catalogue_url!r})
Registry._insert = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
registry.add("line", Path({str(source)!r}), Description(kind="model", identity="x"), actor="ada")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert registry.versions() == []
    assert len(list(registry.objects.names())) == 2
    assert upkeep.collect_garbage(registry, actor="ada").num_objects == 0  # it may still be at work
    with tables.writing(registry.engine) as connection:
        connection.execute(update(tables.leases).values(until=int(time.time()) - 1))
    assert upkeep.collect_garbage(registry, actor="ada").num_objects == 2
    assert upkeep.verify(registry) == []


# --- verify -------------------------------------------------------------------------------------


def tampered(registry, statement, **values):
    with registry.engine.begin() as connection:
        connection.execute(statement, values)
    return upkeep.verify(registry)


def test_a_changed_log_is_noticed(registry, add):
    add("one", accuracy=0.8)
    promote(registry, "1", gates=GATES)
    assert upkeep.verify(registry) == []
    forged = json.dumps({"alias": "stable", "version": 1, "override": None})
    statement = update(tables.log).where(tables.log.c.number == 3).values(details=forged)
    assert tampered(registry, statement) == [
        "log: entry 3 (promote line) does not follow from the one before it; the log was changed "
        "by hand"
    ]


@pytest.mark.parametrize(
    ("number", "message"),
    [(1, "log: entry 1 is missing"), (2, "log: entry 2 is missing"), (3, "its last entries")],
)
def test_a_removed_log_entry_is_noticed(registry, add, number, message):
    add("one", accuracy=0.8)
    promote(registry, "1", gates=GATES)
    problems = tampered(registry, delete(tables.log).where(tables.log.c.number == number))
    assert len(problems) == 1
    assert message in problems[0]


def test_details_that_are_no_json_are_noticed(registry, add):
    add("one")
    assert "entry 1 cannot be read" in tampered(registry, update(tables.log).values(details="{"))[0]


def test_an_alias_moved_by_hand_is_noticed(registry, add):
    add("one", accuracy=0.8)
    add("two", accuracy=0.8)
    promote(registry, "1", gates=GATES)
    second = registry.resolve("line", "2")
    problems = tampered(registry, update(tables.aliases).values(version=second.id))
    assert problems == [
        "line: alias 'stable' points to version 2, by the log to 1; the catalogue was changed by "
        "hand"
    ]


def test_damaged_and_missing_objects_are_noticed(registry, add, tmp_path):
    version = add("one")
    manifest = registry.manifest(version)
    weights = manifest["files"]["weights.safetensors"]["sha256"]
    path = tmp_path / "store/objects" / weights
    path.write_text("eno")
    assert upkeep.verify(registry) == []
    assert upkeep.verify(registry, full=True) == ["line:1: weights.safetensors is damaged"]
    path.unlink()
    assert upkeep.verify(registry) == ["line:1: weights.safetensors is missing"]
    (tmp_path / "store/objects" / version.manifest).unlink()
    assert "line:1: object" in upkeep.verify(registry)[0]


# --- gc -----------------------------------------------------------------------------------------


def test_gc_never_removes_what_an_alias_or_a_child_needs(registry, add, tmp_path):
    """Base <- child (stable), old stable, an unneeded one, a fresh one."""
    add("base")
    add("old-stable", accuracy=0.8)
    add("child", accuracy=0.8, parents=["1"])
    add("unneeded")
    promote(registry, "2", gates=GATES)
    promote(registry, "3")
    with tables.writing(registry.engine) as connection:
        connection.execute(update(tables.versions).values(added_at="2020-01-01T00:00:00+00:00"))
    add("fresh")
    assert upkeep.collect_garbage(registry, actor="ada").num_objects == 0
    swept = upkeep.collect_garbage(registry, actor="ada", drop_older_than_days=30)
    assert [version.name for version in swept.versions] == ["line:4"]
    assert swept.num_objects == 2  # its weights and its manifest; config.json is shared
    for reference in ("1", "2", "3", "5"):
        registry.fetch("line", reference, tmp_path / reference)
    with pytest.raises(RegistryError, match="line:4: its files were removed by gc; add it again"):
        registry.fetch("line", "4", tmp_path / "4")
    with pytest.raises(RegistryError, match="its files were removed"):
        promote(registry, "4", alias="candidate")
    assert upkeep.verify(registry, full=True) == []
    again = add("unneeded")
    assert (again.number, again.is_dropped) == (4, False)
    registry.fetch("line", "4", tmp_path / "4")
    assert registry.rollback("line", alias="stable", actor="ada", reason="x").version.number == 2


def test_gc_stops_rather_than_guess_where_a_manifest_is_gone(registry, add, tmp_path):
    version = add("one")
    (tmp_path / "store/objects" / version.manifest).unlink()
    before = sorted(registry.objects.names())
    with pytest.raises(RegistryError, match="is missing from"):
        upkeep.collect_garbage(registry, actor="ada")
    assert sorted(registry.objects.names()) == before


def test_gc_sweeps_up_unfinished_objects_once_they_are_old(registry, tmp_path):
    leftover = tmp_path / "store/objects/.abc.1.tmp"
    leftover.write_text("half")
    assert upkeep.collect_garbage(registry, actor="ada").num_objects == 0
    os.utime(leftover, (0, 0))
    assert upkeep.collect_garbage(registry, actor="ada").num_bytes == 4


# --- opening ------------------------------------------------------------------------------------


def test_catalogues_that_cannot_be_opened_are_named(tmp_path):
    location = str(tmp_path / "store")
    with pytest.raises(RegistryError, match="name the catalogue with --catalogue"):
        Registry.open("memory://x")
    with pytest.raises(RegistryError, match="catalogue: nonsense cannot be opened"):
        Registry.open(location, catalogue_url="nonsense")
    with pytest.raises(RegistryError, match="cannot be reached"):
        Registry.open(location, catalogue_url="sqlite:////nowhere/at/all.sqlite")
    registry = Registry.open(location)
    with registry.engine.begin() as connection:
        connection.execute(update(tables.state).values(schema_version=9))
    with pytest.raises(
        RegistryError, match="has tables of version 9, this version of Samara reads 1"
    ):
        Registry.open(location)


def test_passwords_are_not_shown():
    url = "postgresql+psycopg://ada:secret@localhost:1/x?connect_timeout=1"
    with pytest.raises(RegistryError) as error:
        tables.open_engine(url)
    assert "secret" not in str(error.value)


def test_a_writer_that_waits_too_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LOCK_SECONDS", 0)
    location = str(tmp_path / "store")
    first, second = Registry.open(location), Registry.open(location)
    with (
        tables.writing(first.engine),
        pytest.raises(RegistryError, match="another process has been writing for 0 seconds"),
        tables.writing(second.engine) as connection,
    ):
        connection.execute(text("select 1"))


def test_objects_may_lie_behind_a_url(add, tmp_path):
    registry = Registry.open("memory://registry", catalogue_url=f"sqlite:///{tmp_path}/c.sqlite")
    from samara.registry.records import Description

    (tmp_path / "x.safetensors").write_text("x")
    description = Description(kind="model", identity="x")
    registry.add("line", tmp_path / "x.safetensors", description, actor="ada")
    registry.fetch("line", "1", tmp_path / "out")
    assert (tmp_path / "out/x.safetensors").read_text() == "x"
    assert upkeep.verify(registry, full=True) == []
