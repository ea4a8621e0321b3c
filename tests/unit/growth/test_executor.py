"""What becomes of work that fails."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pytest
import torch

from samara.errors import NonFiniteLossError, ResourceError, Stopped
from samara.growth.executor import attempt, on_ray, require_ray, sequential
from samara.growth.race import Losses
from samara.growth.selection import Failure, Measurement


def measurement(loss: float = 3.0) -> Measurement:
    return Measurement(
        losses=Losses(nll_sum=np.array([loss, loss]), num_targets=np.ones(2)),
        flops_per_step=1.0,
        training_flops=0.0,
        measuring_flops=0.0,
        tokens=0,
        seconds=0.0,
        exactness=0,
    )


class Crashing:
    """Work that crashes so often before it succeeds."""

    def __init__(self, times: int, error: Exception | None = None) -> None:
        self.times, self.error = times, error or RuntimeError("a card fell off the bus")

    def __call__(self) -> Measurement:
        if self.times:
            self.times -= 1
            raise self.error
        return measurement()


def test_a_crash_is_tried_once_more(caplog):
    assert isinstance(attempt("a", Crashing(1)), Measurement)
    assert "candidate a crashed: RuntimeError: a card fell off the bus" in caplog.text
    work = Crashing(3)
    assert attempt("a", work) == Failure(
        reason="crashed 2 times, the last time by RuntimeError: a card fell off the bus"
    )
    assert work.times == 1


def test_a_loss_that_is_no_number_is_final():
    work = Crashing(2, NonFiniteLossError("step 3: the loss is nan"))
    assert attempt("a", work) == Failure(reason="step 3: the loss is nan")
    assert work.times == 1
    assert attempt("a", lambda: measurement(float("nan"))) == Failure(
        reason="its validation loss is nan"
    )
    assert attempt("a", lambda: measurement(float("inf"))) == Failure(
        reason="its validation loss is inf"
    )


@pytest.mark.parametrize(
    "error", [ResourceError("the disk is full"), Stopped("stop", signal_number=signal.SIGTERM)]
)
def test_what_the_user_can_mend_and_signals_end_the_race(error):
    with pytest.raises(type(error)):
        attempt("a", Crashing(1, error))


def test_others_go_on_in_their_order():
    found = sequential({"b": Crashing(9), "a": Crashing(0)})
    assert list(found) == ["b", "a"]
    assert isinstance(found["b"], Failure)
    assert isinstance(found["a"], Measurement)


def test_ray_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError) as caught:
        require_ray()
    assert str(caught.value) == (
        "executor: ray is asked for and not installed; pip install 'samara[parallel]', or set "
        "executor: sequential"
    )


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray")
    # Workers cannot import a module of tests.
    found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield found
    found.shutdown()


class Dying:
    """Work that kills its process, the first time or always."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __call__(self) -> Measurement:
        if self.marker is None or not self.marker.exists():
            if self.marker is not None:
                self.marker.touch()
            os._exit(1)
        return measurement()


def test_ray_gives_what_sequential_gives(ray, tmp_path):
    works = {
        "good": measurement,
        "nan": Crashing(2, NonFiniteLossError("step 3: the loss is nan")),
        "crash": Crashing(9),
    }
    there = on_ray(works, device=torch.device("cpu"))
    works["crash"] = Crashing(9)
    here = sequential(works)
    assert list(there) == list(here)
    assert (there["nan"], there["crash"]) == (here["nan"], here["crash"])
    assert there["good"].losses.mean == here["good"].losses.mean
    again = on_ray({"once": Dying(tmp_path / "died")}, device=torch.device("cpu"))
    assert isinstance(again["once"], Measurement)
    dead = on_ray({"dead": Dying(None)}, device=torch.device("cpu"))
    assert "its worker died twice" in dead["dead"].reason
    with pytest.raises(ResourceError, match="the disk is full"):
        on_ray({"full": Crashing(1, ResourceError("the disk is full"))}, device=torch.device("cpu"))
