"""However often a run is interrupted, it comes to the same result."""

from __future__ import annotations

import shutil

import pytest

from samara.errors import CheckpointError
from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate


@pytest.mark.parametrize("method", ["droppeft", "fedlora"])
def test_a_run_that_was_killed_goes_on_to_the_same_result_bit_for_bit(
    bases, rows, tmp_path, monkeypatch, method, settings, folder_of, outcome
):
    config = settings(bases["samara"], rows, method=method, server__rounds=3)
    federate(config, folder_of(tmp_path / "whole"))

    class Killed(BaseException):
        pass

    train_client, calls = InProcessDriver.run_round, []

    def killed_in_the_middle(driver):
        # Once after a round, once with its clients trained and the round not finished.
        calls.append(1)
        if len(calls) == 2:  # the second round: its clients train, and are saved
            monkeypatch.setattr(driver.server, "finish", raise_killed)
        if len(calls) == 4:  # between two rounds
            raise Killed
        return train_client(driver)

    def raise_killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "run_round", killed_in_the_middle)
        for _ in range(2):
            with pytest.raises(Killed):
                federate(config, folder_of(tmp_path / "cut"))
    federate(config, folder_of(tmp_path / "cut"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    bases, rows, tmp_path, caplog, settings, folder_of, outcome
):
    config = settings(bases["samara"], rows)
    federate(config, folder_of(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest = tmp_path / "cut/checkpoints/round-00000002"
    (newest / "global.safetensors").write_bytes(b"rubbish")
    federate(config, folder_of(tmp_path / "cut"))
    assert "is cut off" in caplog.text
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    for path in (tmp_path / "cut/checkpoints").iterdir():
        (path / "global.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        federate(config, folder_of(tmp_path / "cut"))


def test_a_checkpoint_of_other_data_is_refused(bases, rows, tmp_path, settings, folder_of):
    config = settings(bases["samara"], rows, server__rounds=1)
    federate(config, folder_of(tmp_path / "run"))
    other = tmp_path / "other.jsonl"
    other.write_text((rows / "train.jsonl").read_text() + (rows / "test.jsonl").read_text())
    changed = settings(bases["samara"], rows, server__rounds=2, data__train=str(other))
    with pytest.raises(CheckpointError, match="belongs to a run of something else"):
        federate(changed, folder_of(tmp_path / "run"))


def test_a_signal_stops_after_the_round_in_hand(
    bases, rows, tmp_path, stop_after_a_round, settings, folder_of, outcome
):
    config = settings(bases["samara"], rows)
    federate(config, folder_of(tmp_path / "whole"))
    stop_after_a_round(config, folder_of(tmp_path / "cut"))
    federate(config, folder_of(tmp_path / "cut"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
