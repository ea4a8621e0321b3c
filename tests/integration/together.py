"""One of several processes that work recipes off together; run by test_together.py.

    python together.py JOB RANK WORLD_SIZE

Imports once and does one job after another, each as ``torchrun`` would start it: through the
variables of the environment, with a port of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from samara.errors import SamaraError, Stopped
from samara.lifecycle import run_recipe
from samara.recipe import load_recipe
from samara.train.optim import Optimizer


def at_step(number: int, rank: int, action: str) -> None:
    """Let one process, at the number-th update from now, be killed or sent SIGTERM."""
    real, calls = Optimizer.step, [0]

    def step(optimizer: Optimizer) -> None:
        calls[0] += 1
        if calls[0] == number and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[action])
        real(optimizer)

    Optimizer.step = step  # type: ignore[method-assign]


def work_off(job: dict[str, Any]) -> str:
    """Do one job; what it said at its end."""
    os.environ["MASTER_PORT"] = str(job["port"])
    real = Optimizer.step
    if "at_step" in job:
        at_step(*job["at_step"])
    try:
        recipe = load_recipe(Path(job["recipe"]), job["settings"])
        run_recipe(recipe, Path(job["out"]), say=lambda _: None)
    except (SamaraError, Stopped) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Optimizer.step = real  # type: ignore[method-assign]
        if distributed.is_initialized():  # after an error a process of its own would end
            distributed.destroy_process_group()
    return "done"


def main(path: str, rank: str, world_size: str) -> None:
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    for job in json.loads(Path(path).read_text()):
        sys.stdout.write(f"{job['name']}: {work_off(job)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
