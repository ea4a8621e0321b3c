"""Runs of a benchmark side by side, each in a process that has a GPU and a thread of its own."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from typing import Any


def add_pool_options(parser: argparse.ArgumentParser) -> None:
    """How many runs at once, where, and for how long."""
    parser.add_argument(
        "--workers", type=int, default=1, help="runs side by side; 0: in this process"
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs they share; 0: the CPU")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long")


class InThisProcess(Executor):
    """Does what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See :class:`concurrent.futures.Executor`."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def open_pool(options: argparse.Namespace) -> Iterator[Executor]:
    """Workers as the options of :func:`add_pool_options` say."""
    if options.workers == 0:
        yield InThisProcess()
        return
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for worker in range(options.workers):
        devices.put(worker % max(1, options.gpus))
    with ProcessPoolExecutor(
        options.workers,
        mp_context=context,
        initializer=_enter,
        initargs=(devices, options.gpus),
    ) as pool:
        yield pool


def _enter(devices: Any, gpus: int) -> None:
    """Give a worker its GPU and one thread, before anything imports torch."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    os.environ["OMP_NUM_THREADS"] = "1"


def collect(
    pool: Executor,
    running: dict[Future[dict[str, Any]], Any],
    *,
    minutes: float,
    done: Callable[[Any, dict[str, Any]], None],
    failed: Callable[[Any], None] | None = None,
) -> bool:
    """Wait for runs, those that finished ones let begin included.

    Args:
        pool: Where they run.
        running: What each future works on, with a ``name``; emptied.
        minutes: After so long what still runs is stopped.
        done: Called with a run and its figures; may submit more into ``running``.
        failed: Called with a run that ended in an error; may do the same.

    Returns:
        Whether all of them ended well and in time.
    """
    deadline = time.monotonic() + 60 * minutes
    all_well = True
    while running:
        left = deadline - time.monotonic()
        ended, _ = wait(running, timeout=max(0.0, left), return_when=FIRST_COMPLETED)
        if not ended:
            stop_pool(pool)
            return False
        for future in ended:
            work, error = running.pop(future), future.exception()
            if error is None:
                done(work, future.result())
            else:
                all_well = False
                print(f"{work.name:60} failed: {error}", flush=True)
                if failed is not None:
                    failed(work)
    return all_well


def stop_pool(pool: Executor) -> None:
    """Time is up: what runs can be gone on with from its checkpoint."""
    processes = (
        list((pool._processes or {}).values()) if isinstance(pool, ProcessPoolExecutor) else []
    )
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
