"""The page's section on federations, from run folders written by hand."""

from __future__ import annotations

import json

import pytest

from samara.errors import CheckpointError
from samara.report.config import ReportConfig
from samara.report.inputs import read_inputs
from samara.report.sections.federated import federated
from samara.runs import RunFolder


def client(number, device, rate, verdict="ok"):
    return {
        "client": number,
        "device": device,
        "rate": rate,
        "verdict": verdict,
        "modelled_peak_bytes": 4e6 * (1 - rate) + 1e6,
    }


def write_run(folder, *, kind="labels", finished=True, rates=(0.5, 0.0), personal=(1,)):
    """Two rounds of three clients, the last of which never takes part."""
    folder.mkdir()
    log = []
    for step in range(3):
        asked = [client(0, "jetson-tx2", rates[0]), client(1, "pi", rates[step % 2])]
        log.append(
            {
                "step": step,
                "modelled_seconds": 3600.0 * 4 * step,
                "modelled_joules": 2e3 * step,
                "bytes_down": 1e6 * step,
                "bytes_up": 5e5 * step,
                "validation_loss": 1.0 - 0.1 * step,
                "validation_accuracy": 0.5 + 0.1 * step if kind == "labels" else None,
                **({"clients": asked} if step else {}),
            }
        )
    text = "".join(json.dumps(record) + "\n" for record in log)
    (folder / "metrics.jsonl").write_text(text)
    if not finished:
        return str(folder)
    name = "accuracy" if kind == "labels" else "loss"
    each = [
        {
            "client": number,
            "personal": {
                "loss": 0.5 + 0.1 * number,
                "accuracy": 0.9 - 0.1 * number if kind == "labels" else None,
            },
            "personal_layers": list(personal) if number < 2 else [],
        }
        for number in range(3)
    ]
    results = {
        "task": {"name": "reviews", "kind": kind},
        "method": "droppeft",
        "rounds": 2,
        "test": {"best": {"loss": 0.8, "accuracy": 0.71 if kind == "labels" else None}},
        "clients": {
            "number": 3,
            "personal": {f"{name}_mean": 0.8, f"{name}_worst_decile": 0.7},
            "each": each,
        },
        "trained_parameters": 2048,
        "modelled": {"seconds": 28800.0, "joules": 4e3, "clock": {"basis": "measured"}},
        "measured": {"cpu_seconds": 12.0, "bytes_down": 2e6, "bytes_up": 1e6},
    }
    (folder / "results.json").write_text(json.dumps(results))
    sharing = {"num_layers": 4, "clients": {"0": {"personal": [1]}, "1": {"personal": [1]}}}
    (folder / "sharing.json").write_text(json.dumps(sharing))
    return str(folder)


def section(tmp_path, runs):
    (tmp_path / "report").mkdir(exist_ok=True)
    inputs = read_inputs(ReportConfig(federated=runs), RunFolder(tmp_path / "report"))
    found = federated(inputs)
    return None if found is None else found.render()


def test_without_federations_there_is_no_section(tmp_path):
    assert section(tmp_path, {}) is None


def test_scores_costs_choices_layers_and_clients_are_shown_with_where_they_come_from(tmp_path):
    runs = {"one": write_run(tmp_path / "a"), "<two>": write_run(tmp_path / "b")}
    html = section(tmp_path, runs)
    assert "&lt;two&gt;" in html
    assert "<two>" not in html
    for title in (
        "hours on the devices (modelled)",
        "bytes sent and received (counted)",
        "energy of the clients (modelled)",
    ):
        assert html.count(f'<div class="axis-title x">{title}</div>') == 1
    assert "test accuracy, global model <small>measured</small>" in html
    assert "peak of a training <small>modelled, mean</small>" in html
    assert html.count(">3.00\u202fMB<") >= 2  # sent and received
    # client 1 is told 0 in one round of two, on a device of its own
    assert ">1 of 2<" in html
    assert "jetson-tx2" in html
    # of four layers only the second is kept, by two of three clients
    assert html.count(">2 keep it<") == 2
    assert html.count(">0 keep it<") == 6
    assert "1 client never took part." in html
    assert "worst decile 70\u202f%" in html


def test_a_loss_is_told_in_nats_and_less_of_it_is_better(tmp_path):
    html = section(tmp_path, {"one": write_run(tmp_path / "a", kind="perplexity")})
    assert "Loss of each client (measured)" in html
    assert "left is better" in html
    assert "0.800 nats" in html
    assert "validation loss, nats" in html


def test_where_nothing_is_chosen_or_kept_nothing_is_drawn(tmp_path):
    html = section(tmp_path, {"one": write_run(tmp_path / "a", rates=(0.0, 0.0), personal=())})
    assert "Layers dropped" not in html
    assert "keep for themselves" not in html


def test_of_a_run_that_promises_privacy_what_is_not_known_is_left_out(tmp_path):
    runs = {"open": write_run(tmp_path / "a"), "private": write_run(tmp_path / "b")}
    path = tmp_path / "b/results.json"
    results = json.loads(path.read_text())
    del results["measured"]
    results["clients"] = {"number": 3}
    spent = {"epsilon": 3.254, "budget": 8.0, "delta": 0.001}
    records = {"budget": 4.0, "delta": 0.01}
    results["privacy"] = {"randomness": "reproducible", "client": spent, "records": records}
    results["privacy"]["secure_sum"] = {"threshold": 0.67}
    path.write_text(json.dumps(results))
    html = section(tmp_path, runs)
    assert html.count(">3.00\u202fMB<") == 1  # of the open one
    assert "worst decile 70\u202f%" in html
    assert "epsilon 3.25 of 8 is spent, at delta 0.001" in html
    assert "a budget of epsilon 4 at delta 0.01 for each client" in html
    assert "the server learns the sum over clients alone" in html
    assert "nothing is protected here" in html
    alone = section(tmp_path, {"private": runs["private"]})
    assert "of each client (measured)" not in alone
    assert "Privacy" not in section(tmp_path, {"open": runs["open"]})


def test_what_has_not_finished_is_said_and_a_damaged_file_is_named(tmp_path):
    runs = {"late": write_run(tmp_path / "a", finished=False)}
    assert "late has no results yet (unfinished)." in section(tmp_path, runs)
    broken = write_run(tmp_path / "b")
    (tmp_path / "b" / "results.json").write_text('{"task": {}}')
    with pytest.raises(CheckpointError, match=r"results\.json: task\.name: field required"):
        section(tmp_path, {"broken": broken})
    with pytest.raises(CheckpointError, match=r"report\.federated\.gone: .*no such folder"):
        section(tmp_path, {"gone": str(tmp_path / "gone")})
