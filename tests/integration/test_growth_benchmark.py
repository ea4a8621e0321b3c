"""The growth benchmark: its findings on made-up curves, its page, and the order of its queue."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from samara.errors import SamaraError

UNITS, TARGETS = 8, 10.0
CURVES = {
    # operator: losses after 0, 25, 50, 100 steps; the order is turned round, then right
    "a": (4.0, 3.0, 2.4, 1.0),
    "b": (3.0, 2.9, 2.5, 1.2),
    "c": (2.0, 2.8, 2.6, 1.3),
    "d": (1.0, 2.7, 2.7, 2.0),
}
STEPS = (0, 25, 50, 100)


def grown_row(operator: str, losses: tuple[float, ...], **other: Any) -> dict[str, Any]:
    """A row whose units have all the same loss: differences are exact."""
    rungs = {
        str(k): " ".join([f"{TARGETS * v:.8g}"] * UNITS) for k, v in zip(STEPS, losses, strict=True)
    }
    return {
        "name": f"grown {operator} {other.get('seed', 1)}",
        "kind": "grown",
        "objective": "causal_lm",
        "seed": 1,
        "lr": 0.002,
        "operator": operator,
        "budget": 1.0,
        "exactness": "changes",
        "num_targets": " ".join([f"{TARGETS:g}"] * UNITS),
        "rungs": rungs,
        "flops_per_step": 10.0,
        "flops": 1500.0,
        **other,
    }


def scratch_row(seed: int, lr: float, loss: float, budget: float = 1.0) -> dict[str, Any]:
    return {
        "name": f"scratch {seed} {lr} {budget}",
        "kind": "scratch",
        "objective": "causal_lm",
        "seed": seed,
        "lr": lr,
        "budget": budget,
        "loss": loss,
        "flops": 1500.0 * budget,
        "parameters": 2_000_000,
    }


def rows(seeds: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    return [grown_row(name, curve, seed=seed) for seed in seeds for name, curve in CURVES.items()]


@pytest.fixture(scope="module")
def findings(benchmark) -> Any:
    return benchmark("growth_findings")


@pytest.fixture(scope="module")
def replays(benchmark) -> Any:
    return benchmark("growth_replays")


def test_known_ranks_give_known_correlations_regrets_and_costs(findings):
    found = findings.foretold(findings.grown(rows(), "causal_lm"))
    assert [one.step for one in found] == [0, 25, 50]
    assert [one.spearman.value for one in found] == pytest.approx([-1.0, -1.0, 1.0])
    assert found[0].by_seed == pytest.approx((-1.0, -1.0))
    assert [one.lowest for one in found] == [("d",), ("d",), ("a",)]
    assert [one.hits for one in found] == [0, 0, 2]
    assert [one.regret for one in found] == pytest.approx([1.0, 1.0, 0.0])
    # the median of 1, 1.2, 1.3, 2 is 1.25
    assert [one.relative_regret for one in found] == pytest.approx([4.0, 4.0, 0.0])
    assert [one.gross for one in found] == [0.0, 1.0, 2.0]
    assert [one.net for one in found] == [0.0, 0.75, 1.5]
    assert found[0].gain.value == found[0].gain.low == found[0].gain.high == 0.0
    assert found[2].gain.value == pytest.approx(2.0)


def test_the_mean_over_seeds_is_of_correlations_not_of_losses(findings):
    # seed 2 ends in the order of its start: -1 and 1
    other = [grown_row(n, (c[0], *c[1:3], c[0]), seed=2) for n, c in CURVES.items()]
    found = findings.foretold(findings.grown([*rows((1,)), *other], "causal_lm"))
    assert found[0].by_seed == pytest.approx((-1.0, 1.0))
    assert found[0].spearman.value == pytest.approx(0.0)
    assert found[0].hits == 1
    pool = findings.grown([*rows((1,)), *other], "causal_lm")
    assert findings.between_seeds(pool) == pytest.approx(-1.0)
    assert findings.blind_regret(pool) == pytest.approx((0 + 0.2 + 0.3 + 1 + 3 + 2 + 1 + 0) / 8)


def test_of_several_lowest_the_regret_is_their_mean(findings):
    tied = {**CURVES, "b": (1.0, *CURVES["b"][1:])}
    pool = findings.grown([grown_row(n, c) for n, c in tied.items()], "causal_lm")
    first = findings.foretold(pool)[0]
    assert first.lowest == ("b", "d")
    assert first.regret == pytest.approx((0.2 + 1.0) / 2)
    assert first.spearman.value == pytest.approx(-3 / math.sqrt(5 * 4.5))


def test_an_operator_that_a_seed_lacks_is_left_out(findings):
    pool = findings.grown(rows()[:-1], "causal_lm")
    assert [list(runs) for runs in pool.values()] == [["a", "b", "c"]] * 2
    assert findings.grown(rows(), "ul2") == {}


def test_intervals_hold_the_value_and_come_out_the_same_again(findings):
    mixed = {**CURVES, "e": (2.5, 2.75, 2.45, 1.1), "f": (0.5, 2.65, 2.8, 0.9)}
    pool = findings.grown([grown_row(n, c) for n, c in mixed.items()], "causal_lm")
    once = findings.foretold(pool)
    findings._correlations.cache_clear()
    assert findings.foretold(pool) == once
    for one in once:
        assert one.spearman.low <= one.spearman.value <= one.spearman.high
        assert -1.0 <= one.spearman.low < one.spearman.high <= 1.0


def test_a_correlation_holds_from_where_all_later_intervals_are_above_zero(findings):
    interval, found = findings.Interval, findings.foretold(findings.grown(rows(), "causal_lm"))

    def with_lows(*lows: float) -> list[Any]:
        bounds = [interval(value=0.5, low=low, high=1.0, confidence=0.95) for low in lows]
        replace = findings.Foretold
        return [
            replace(**{**vars(one), "spearman": bound, "gain": bound})
            for one, bound in zip(found, bounds, strict=True)
        ]

    assert findings.holds_from(with_lows(0.1, -0.1, 0.2)).step == 50
    assert findings.holds_from(with_lows(0.1, 0.1, 0.2), gain=True).step == 0
    assert findings.holds_from(with_lows(0.1, 0.1, 0.0)) is None


def test_rules_choose_and_spend_what_they_would_have(findings, replays):
    pool = findings.grown(rows(), "causal_lm")
    found = {str(one.rule.kind) + str(getattr(one.rule, "k", getattr(one.rule, "cap", ""))): one
             for one in replays.replayed(pool)}  # fmt: skip
    assert list(found) == [
        "fixed0", "fixed25", "fixed50", "halving1.0",
        "paired0.1", "paired0.25", "paired0.5", "paired1.0",
    ]  # fmt: skip
    assert [found[f"fixed{k}"].regret for k in (0, 25, 50)] == pytest.approx([1.0, 1.0, 0.0])
    assert [found[f"fixed{k}"].spent for k in (0, 25, 50)] == pytest.approx([0.0, 1.0, 2.0])
    # four candidates to step 25 cost 1 T: more than these caps, so the start decides
    for cap in (0.1, 0.25, 0.5):
        assert found[f"paired{cap}"].stopped_at == (0, 0)
        assert found[f"paired{cap}"].spent == 0.0
        assert found[f"paired{cap}"].unresolved == 2
    # halving keeps d and c at 25, and a further rung would cost 0.5 T more than its cap
    assert found["halving1.0"].stopped_at == (25, 25)
    assert found["halving1.0"].regret == pytest.approx(1.0)
    assert found["halving1.0"].unresolved == 0
    assert not any(one.missing for one in found.values())


def test_rules_take_the_exact_one_of_those_that_cannot_be_told_apart(findings, replays):
    same = grown_row("kept", CURVES["b"], exactness="exact")
    pool = findings.grown([grown_row("a", CURVES["b"]), same], "causal_lm")
    first = replays.replayed(pool)[0]
    assert (first.regret, first.unresolved) == (0.0, 1)
    assert math.isnan(first.relative_regret)  # of a pool that is all the same
    assert replays._race(pool[1], first.rule, 100).winner == "kept"


def test_a_rung_that_nobody_measured_is_named(findings, replays):
    pool = findings.grown(rows(), "causal_lm")
    for runs in pool.values():
        for run in runs.values():
            del run.measured[50]
    found = replays.replayed(pool)
    assert [one.missing for one in found] == [(), (), *[(50,)] * 5]
    assert math.isnan(found[-1].regret)


def test_scratch_is_interpolated_in_log_flops_and_never_beyond_its_runs(findings):
    sweep = [scratch_row(1, 0.001, 3.0), scratch_row(1, 0.002, 2.0), scratch_row(2, 0.002, 2.2)]
    scratch = findings.scratch([*rows(), *sweep, scratch_row(1, 0.002, 1.0, 4.0)], "causal_lm")
    assert (scratch.lr, scratch.grown_lr, scratch.swept_seed) == (0.002, 0.002, 1)
    assert scratch.sweep == {0.001: 3.0, 0.002: 2.0}
    assert scratch.losses == {1: 2.0, 2: 2.2}
    assert scratch.flops_for(1.5) == pytest.approx(3000.0)  # half way from x1 to x4 is x2
    assert scratch.flops_for(2.0) == pytest.approx(1500.0)
    assert scratch.flops_for(2.1) is None
    assert scratch.flops_for(0.9) is None
    assert findings.scratch(rows(), "causal_lm") is None
    with pytest.raises(SamaraError, match=r"scratch runs of causal_lm: .* swept in 0 seeds; run"):
        findings.scratch([*rows(), sweep[0]], "causal_lm")


def test_differences_to_scratch_are_paired_by_seed(findings):
    pool = findings.grown(rows((1, 2, 3)), "causal_lm")
    sweep = [scratch_row(1, 0.001, 9.0), scratch_row(1, 0.002, 1.1)]
    sweep += [scratch_row(2, 0.002, 1.2), scratch_row(3, 0.002, 1.3)]
    scratch = findings.scratch([*rows(), *sweep, scratch_row(1, 0.002, 0.9, 4.0)], "causal_lm")
    found = findings.ended(pool, scratch)
    assert [one.operator for one in found] == ["a", "b", "c", "d"]
    best, second = found[0], found[1]
    # differences of -0.1, -0.2, -0.3: mean -0.2, standard error 0.1 / sqrt 3, t of two degrees
    assert best.against_scratch.value == pytest.approx(-0.2)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert best.against_scratch.high == pytest.approx(-0.2 + half)
    assert best.saved == pytest.approx(0.5)  # 1.0 is half way from 1.1 to 0.9
    assert second.saved is None  # ends above scratch
    assert (best.last, best.deviation, best.at_growth) == pytest.approx((1.0, 0.0, 4.0))
    assert findings.mean_difference([-0.1, -0.2]) is None
    assert all(one.against_scratch is None for one in findings.ended(pool, None))


# --- the page -------------------------------------------------------------------------------------


def figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = {
        "source_steps": 50,
        "steps": 100,
        "batch_size": 2,
        "sequence_length": 8,
        "evaluation_tokens": 80,
        "seeds": {"causal_lm": [1, 2]},
    }
    source = {"name": "source", "kind": "source", "objective": "causal_lm", "parameters": 1_000_000}
    return {
        "command": "python benchmarks/growth.py",
        "environment": {"cpu": "a CPU", "packages": {"torch": "2"}, "commit": "c"},
        "settings": {"scale": "toy", "sizes": sizes},
        "rows": [source, *found],
    }


def test_the_page_says_what_the_figures_say(benchmark, tmp_path):
    results = benchmark("results")
    path = tmp_path / "growth-toy.json"
    path.write_text(json.dumps(figures(rows())))
    page = results.markdown(tmp_path)
    assert "### Growth, causal_lm: 4 operators, 2 seeds" in page
    assert "does not foretell the last one* in 1 of 1 objectives" in page
    assert (
        "At k = 0 the correlation is -1.00 [-1.00, -1.00]: the loss right after growth mis" in page
    )
    assert "from k = 50 on it costs less than the lot (0.000)" in page
    assert (
        "| 50 | 50.0% | 1.00 [1.00, 1.00] | 1.00, 1.00 | 2.00 [2.00, 2.00] | a | 2 of 2 |" in page
    )
    assert "Under a cap of 0.1 or 0.25 or 0.5 the pool does not even reach the first rung" in page
    assert "Every rung that they need was recorded." in page
    assert "No scratch run was made." in page
    assert "Not run: `source_causal_lm_1`; " in page
    assert "(growth-lag.svg)" in page

    scratch = [scratch_row(1, 0.001, 9.0), scratch_row(1, 0.002, 1.5)]
    lacking = rows()
    for row in lacking:
        del row["rungs"]["50"]
    path.write_text(json.dumps(figures([*lacking, *scratch])))
    page = results.markdown(tmp_path)
    assert "paired race, cap 1 needs losses after 50 steps, which were not recorded." in page
    assert "was recorded." not in page
    assert "that a lag foretells better is not shown here" in page
    assert "swept at seed 1: 9.0000 at 0.001, 1.5000 at 0.002; the best is kept" in page
    assert "the same rate; they were not tuned" in page
    assert "From 1.0M parameters to 2.0M; 50 steps before growth and 100 after" in page


def test_the_picture_has_a_panel_per_objective_and_a_dot_per_seed(benchmark):
    both = [*rows(), *({**row, "objective": "ul2"} for row in rows())]
    svg = benchmark("growth_plot").picture([figures(both)])
    assert svg.count('class="title"') == svg.count('class="band"') == 2
    assert svg.count('class="mean"') == 2 * 3
    assert svg.count('class="seed"') == 2 * 3 * 2
    assert "prefers-color-scheme: dark" in svg
    assert "4 operators, 2 seeds" in svg


# --- the queue ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def growth(benchmark) -> Any:
    return benchmark("growth")


def test_sources_of_the_first_seeds_and_the_sweep_can_begin_at_once(growth):
    tasks = growth.first_tasks(growth.SCALES["8m"])
    assert [(task.objective, task.seed) for task in tasks if task.kind == "source"] == [
        ("causal_lm", 1), ("masked_lm", 1), ("ul2", 1),
        ("causal_lm", 2), ("masked_lm", 2), ("ul2", 2), ("causal_lm", 3),
    ]  # fmt: skip
    assert {task.lr for task in tasks if task.kind == "source"} == {3e-3}
    sweep = [task for task in tasks if task.kind == "scratch"]
    assert [(task.seed, task.lr) for task in sweep] == [(1, 1.5e-3), (1, 3e-3), (1, 6e-3)]


def test_a_source_lets_its_pool_begin_and_a_grown_model_nothing(growth):
    source = growth.Task(kind="source", objective="causal_lm", seed=2, lr=0.1)
    behind = growth.tasks_behind(source)
    assert [task.operator for task in behind] == list(growth.OPERATORS)
    assert {(task.kind, task.seed, task.lr) for task in behind} == {("grown", 2, 0.1)}
    of_ul2 = growth.tasks_behind(growth.Task(kind="source", objective="ul2", seed=2, lr=0.1))
    assert [task.operator for task in of_ul2] == list(growth.FEW)
    assert growth.tasks_behind(behind[0]) == []
    assert len({task.name for task in behind}) == len(behind)


def test_the_best_rate_is_known_once_the_whole_sweep_is_in(growth):
    scale = growth.SCALES["8m"]
    sweep = [scratch_row(1, lr, loss) for lr, loss in ((1.5e-3, 3.0), (3e-3, 2.5), (6e-3, 2.0))]
    dear = scratch_row(1, 3e-3, 1.0, budget=1.4)
    other = scratch_row(2, 3e-3, 1.0)
    assert growth.tasks_at_best_rate(scale, [*sweep[:2], dear, other]) == []
    tasks = growth.tasks_at_best_rate(scale, [*sweep, dear, other])
    assert {task.lr for task in tasks} == {6e-3}
    assert [(task.budget, task.seed) for task in tasks] == [
        (more, seed) for more in (1.0, 1.4) for seed in (1, 2, 3)
    ]
    # one of them is in the sweep
    assert len(growth.whole_queue(scale, sweep)) == 7 + 3 + 30 + 10 + 10 + 5
    assert len(growth.whole_queue(scale, [])) == 7 + 3 + 30 + 10 + 10


@pytest.fixture
def queue(growth, benchmark, tmp_path, monkeypatch) -> Any:
    """Works the toy queue off with runs that only leave a folder and a row."""
    ran: list[str] = []
    record = benchmark("record").Record(
        None, script="growth.py", arguments=[], device="cpu", settings={}
    )
    failing: set[str] = set()

    def carry_out(scale: Any, task: Any, corpus: Any, out: Any) -> dict[str, Any]:
        ran.append(task.name)
        if task.name in failing:
            raise RuntimeError("no room")
        (out / task.name).mkdir(exist_ok=True)
        return {**vars(task), "name": task.name, "loss": task.lr, "wall": 0.0}

    @contextlib.contextmanager
    def threads(options: Any) -> Any:
        with ThreadPoolExecutor(2) as pool:
            yield pool

    monkeypatch.setattr(growth, "carry_out", carry_out)
    monkeypatch.setattr(growth, "open_pool", threads)
    options = argparse.Namespace(minutes=1.0, corpus=tmp_path, out=tmp_path)

    def work() -> tuple[bool, list[str]]:
        ran.clear()
        return growth.work_off(growth.SCALES["toy"], options, record), sorted(ran)

    return argparse.Namespace(work=work, record=record, failing=failing, out=tmp_path)


def test_a_queue_runs_everything_once_and_on_resume_only_what_is_missing(growth, queue):
    whole, ran = queue.work()
    names = [row["name"] for row in queue.record.rows]
    tasks = growth.whole_queue(growth.SCALES["toy"], queue.record.rows)
    assert whole
    assert ran == sorted(names) == sorted(task.name for task in tasks)
    assert queue.work() == (True, [])
    # rows of an earlier go: what is in the file is not run again, what is not is
    lost = [row for row in queue.record.rows if "LLaMA" in row["name"] or "x1.5" in row["name"]]
    queue.record.rows[:] = [row for row in queue.record.rows if row not in lost]
    assert queue.work() == (True, sorted(row["name"] for row in lost))


def test_a_source_whose_folder_is_gone_runs_again_and_is_not_recorded_twice(queue):
    queue.work()
    (queue.out / "source_ul2_1").rmdir()
    assert queue.work() == (True, ["source_ul2_1"])
    names = [row["name"] for row in queue.record.rows]
    assert len(names) == len(set(names))


def test_a_failed_run_does_not_stop_the_others(queue, capsys):
    queue.failing.add("source_ul2_1")
    whole, ran = queue.work()
    assert not whole
    assert "source_ul2_1" not in {row["name"] for row in queue.record.rows}
    assert not any(name.startswith("grown_ul2") for name in ran)
    assert sum(name.startswith("grown_causal_lm") for name in ran) == 10
    assert "failed: no room" in capsys.readouterr().out
