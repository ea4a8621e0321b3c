"""Work off a recipe: run folders, locks, status, and which stages of a chain are already done."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from samara.config import load_yaml
from samara.errors import ConfigError, Stopped
from samara.launch import Launch, launch
from samara.progress import duration
from samara.recipe import VERBS, Recipe, Stage, plain
from samara.runs import RunFolder, differences, write_bytes

TOGETHER = ("pretrain", "instruct")
"""The verbs that several processes can work off together."""

Say = Callable[[str], None]
Action = Literal["skip", "resume", "run", "redo"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done with one stage, and why."""

    stage: Stage
    folder: Path
    action: Action
    reason: str


def plan(recipe: Recipe, out: Path) -> list[Plan]:
    """Compare a recipe with what its folder holds; touches nothing.

    A stage is skipped if it finished with the same settings and the same inputs, resumed if it was
    interrupted, and redone if its settings or inputs changed.
    """
    plans: list[Plan] = []
    fingerprints = recipe.fingerprints()
    for stage in recipe.stages:
        folder = out / stage.name
        action, reason = _decide(stage, RunFolder(folder), fingerprints, recipe, out)
        plans.append(Plan(stage=stage, folder=folder, action=action, reason=reason))
    return plans


def _decide(
    stage: Stage,
    run: RunFolder,
    fingerprints: dict[str, str],
    recipe: Recipe,
    out: Path,
) -> tuple[Action, str]:
    status = run.status()
    if not status:
        return "run", "new"
    if status.get("fingerprint") != fingerprints[stage.name]:
        changed_inputs = [
            name
            for name in stage.needs
            if RunFolder(out / name).status().get("fingerprint") != fingerprints[name]
        ]
        return "redo", _what_changed(stage, run, recipe, out, changed_inputs)
    if status["state"] == "finished":
        return "skip", "finished, unchanged"
    return "resume", f"was {status['state']}"


def _what_changed(
    stage: Stage, run: RunFolder, recipe: Recipe, out: Path, changed_inputs: list[str]
) -> str:
    if not run.recipe_path.exists():
        return "its recipe was not recorded"
    new = stage_recipe(recipe, stage, out)
    changed = differences(load_yaml(run.recipe_path), new)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"changed: {'; '.join(changed[:3])}{more}"
    return f"changed: its input {', '.join(changed_inputs)}"


def stage_recipe(recipe: Recipe, stage: Stage, out: Path) -> dict[str, Any]:
    """The recipe that runs this stage alone, with the folders of its inputs written out."""
    folders = {s.name: out / s.name for s in recipe.stages}
    name = f"{recipe.name}/{stage.name}" if stage.name else recipe.name
    return {"schema": 1, "name": name, stage.verb: plain(stage.config(folders))}


def run_recipe(recipe: Recipe, out: Path, *, say: Say, only: str | None = None) -> None:
    """Work off a recipe in the folder ``out``.

    Args:
        recipe: What to do.
        out: The run folder; a chain's stages are folders inside it.
        say: Called with each line for the user.
        only: Name of the one stage to work off; its inputs must be finished.

    Processes that ``torchrun`` started work off one verb together; the first has the run folder.

    Raises:
        ConfigError: If several were started, and the recipe is for one.
        SamaraError: If a stage fails on something the user can mend; its status says so.
        Stopped: If a signal stopped it; running it again goes on.
    """
    started = launch()
    if started is not None and started.world_size > 1:
        _check_together(recipe, started)
        if started.rank > 0:
            _follow(recipe, out)
            return
    if not recipe.is_lifecycle:
        _run_single(recipe, out, say)
        return
    top = RunFolder(out)
    with top.locked(), _recorded(top, fingerprint=None):
        _write_top_recipe(top, recipe)
        for item in plan(recipe, out):
            if only is not None and item.stage.name != only:
                continue
            _run_stage(recipe, item, out, say)


def _check_together(recipe: Recipe, started: Launch) -> None:
    if recipe.is_lifecycle:
        raise ConfigError(
            f"{recipe.name}: has stages, which one process works off, and {started.world_size} "
            "were started; start one, or give torchrun a recipe of pretrain or instruct alone"
        )
    verb = recipe.stages[0].verb
    if verb not in TOGETHER:
        raise ConfigError(
            f"{verb}: runs in one process, and {started.world_size} were started; start one"
        )


def _follow(recipe: Recipe, out: Path) -> None:
    """Do the work of a process other than the first, whose files nobody needs."""
    (item,) = plan(recipe, out)
    if item.action == "skip":
        return
    with tempfile.TemporaryDirectory(prefix="samara-process-") as scratch:
        run = RunFolder(Path(scratch) / (out.name or "run"))
        run.path.mkdir()
        VERBS[item.stage.verb].load()(item.stage.config({}), run)


def _write_top_recipe(top: RunFolder, recipe: Recipe) -> None:
    """A chain may change between runs (its stages say so one by one): record the newest."""
    top.recipe_path.unlink(missing_ok=True)
    top.start(recipe.resolved())


def _run_single(recipe: Recipe, out: Path, say: Say) -> None:
    (item,) = plan(recipe, out)
    run = RunFolder(out)
    if item.action == "skip":
        say(f"{out}: {item.reason}; give another folder with --out to run it again")
        return
    with run.locked():
        run.start(recipe.resolved())  # refuses the folder of another recipe
        with _recorded(run, fingerprint=recipe.fingerprints()[""]):
            VERBS[item.stage.verb].load()(item.stage.config({}), run)


def _run_stage(recipe: Recipe, item: Plan, out: Path, say: Say) -> None:
    label = f"{item.stage.name} ({item.stage.verb})"
    if item.action == "skip":
        say(f"{label}: {item.reason}")
        return
    if item.action == "redo":
        say(f"{label}: {item.reason}; the old result moves to {_set_aside(item.folder)}")
    else:
        say(f"{label}: {'starts' if item.action == 'run' else 'goes on, it ' + item.reason}")
    run, started = RunFolder(item.folder), time.monotonic()
    folders = {stage.name: out / stage.name for stage in recipe.stages}
    with run.locked():
        run.start(stage_recipe(recipe, item.stage, out))
        with _recorded(run, fingerprint=recipe.fingerprints()[item.stage.name]):
            VERBS[item.stage.verb].load()(item.stage.config(folders), run)
    _publish(run, out)
    say(f"{label}: finished in {duration(time.monotonic() - started)}")


def _publish(run: RunFolder, out: Path) -> None:
    """Put a chain's page where its reader looks first: at the top of the chain's folder."""
    page = run.path / "report.html"
    if page.exists():
        write_bytes(out / page.name, page.read_bytes())


@contextmanager
def _recorded(run: RunFolder, *, fingerprint: str | None) -> Iterator[None]:
    """Keep ``status.json`` true whatever happens inside."""
    details = {} if fingerprint is None else {"fingerprint": fingerprint}
    run.set_status("running", **details)
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        run.set_status("stopped", message=str(stop) or "interrupted", **details)
        raise
    except BaseException as error:
        run.set_status("failed", message=f"{type(error).__name__}: {error}", **details)
        raise
    run.set_status("finished", **details)


def _set_aside(folder: Path) -> Path:
    """Move a superseded result out of the way: nothing a user made is deleted for him."""
    number = 1
    while (target := folder.parent / "superseded" / f"{folder.name}-{number}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    shutil.move(folder, target)
    return target
