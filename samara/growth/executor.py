"""Who trains the candidates: one after the other here, or side by side as Ray tasks.

Both give the same measurements: a task reads everything from its trial's folder and writes
everything there, so the folder has to be one that all machines see. What goes wrong is sorted here:

* a loss that is no number puts the candidate out of the race;
* a crash (anything unexpected, a killed worker) is tried once more from the trial's newest
  checkpoint, and puts the candidate out if it comes again;
* what the user can mend (a full disk) and stop signals end the race, which goes on when it is run
  again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from samara.errors import NonFiniteLossError, ResourceError, SamaraError, Stopped
from samara.growth.selection import Failure, Measurement, Outcome

log = logging.getLogger(__name__)

Work = Callable[[], Measurement]
Execute = Callable[[Mapping[str, Work]], dict[str, Outcome]]
"""From one piece of work per candidate to what came of it, in the same order."""

ATTEMPTS = 2


def attempt(name: str, work: Work) -> Outcome:
    """Do the work, twice if it crashes.

    Raises:
        SamaraError: What the user can mend; but for a loss that is no number.
        Stopped: If a signal stopped it.
    """
    reason = ""
    for number in range(1, ATTEMPTS + 1):
        try:
            measurement = work()
        except NonFiniteLossError as error:
            return Failure(reason=str(error))
        except (SamaraError, Stopped):
            raise
        except Exception as error:
            reason = f"crashed {number} times, the last time by {type(error).__name__}: {error}"
            log.warning("candidate %s crashed: %s: %s", name, type(error).__name__, error)
            continue
        return _finite(measurement)
    return Failure(reason=reason)


def _finite(measurement: Measurement) -> Outcome:
    mean = measurement.losses.mean
    if mean - mean != 0.0:  # infinite or not a number
        return Failure(reason=f"its validation loss is {mean}")
    return measurement


def sequential(works: Mapping[str, Work]) -> dict[str, Outcome]:
    """One after the other, in this process."""
    return {name: attempt(name, work) for name, work in works.items()}


@dataclass(frozen=True, kw_only=True)
class Mendable:
    """An error for the user, on its way from a worker."""

    error: SamaraError


def on_ray(works: Mapping[str, Work], *, device: torch.device) -> dict[str, Outcome]:
    """Side by side as Ray tasks: one per GPU, or one per core.

    Joins the cluster that ``RAY_ADDRESS`` names, or starts one of this machine's devices.

    Raises:
        ResourceError: If Ray is not installed.
        SamaraError: What the user can mend, from any task.
    """
    ray = require_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=1, num_gpus=int(device.type == "cuda"), max_retries=0)(_in_worker)
    threads = torch.get_num_threads()
    tasks = {name: remote.remote(name, work, threads) for name, work in works.items()}
    try:
        return {
            name: _collect(
                ray, name, task, again=functools.partial(remote.remote, name, works[name], threads)
            )
            for name, task in tasks.items()
        }
    except BaseException:
        for task in tasks.values():
            ray.cancel(task, force=True)
        raise


def require_ray() -> Any:
    """Import Ray.

    Raises:
        ResourceError: If it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ResourceError(
            "executor: ray is asked for and not installed; pip install 'samara[parallel]', or set "
            "executor: sequential"
        ) from None
    return ray


def _in_worker(name: str, work: Work, threads: int) -> Outcome | Mendable:
    """Run in a worker process. Sums depend on the number of threads: it is that of the driver."""
    torch.set_num_threads(threads)
    try:
        return attempt(name, work)
    except SamaraError as error:
        return Mendable(error=error)


def _collect(ray: Any, name: str, task: Any, *, again: Callable[[], Any]) -> Outcome:
    """Wait for a task; one whose worker died is sent once more."""
    for last in (False, True):
        try:
            outcome: Outcome | Mendable = ray.get(task)
        except ray.exceptions.RayError as error:
            if last:
                return Failure(reason=f"its worker died twice, the last time of {error}")
            log.warning("candidate %s: its worker died: %s", name, error)
            task = again()
            continue
        if isinstance(outcome, Mendable):
            raise outcome.error
        return outcome
    raise AssertionError("the second attempt returns or raises")
