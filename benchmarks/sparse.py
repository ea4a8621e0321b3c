r"""Sparse training against full fine-tuning, LoRA and SHiRA: tokens per second and peak memory.

    python benchmarks/sparse.py                                   # a toy, on this machine's CPU
    python benchmarks/sparse.py --device cuda --json sparse-cuda.json       # 1b; about 5 minutes
    python benchmarks/sparse.py --device cuda --shapes 130m --batch 16 --variants eager compiled \
        --methods full lora element column two_level --json sparse-cuda-130m.json

Every case trains in a process of its own on random tokens, through the real loop, with clipping.
Weights are random: bfloat16 on CUDA (gradients and AdamW's moments of full fine-tuning, LoRA's
factors and their moments too, which is their least and fastest), float32 on CPU. All methods get
the same loop, the fused AdamW (ours: its own few kernels), the same compilation of layers and the
same checkpointing. LoRA is on all linear layers, with the rank whose number of weights is nearest
to ``--density``; the other methods train as many (ours on its default targets, all but queries and
keys), drawn at random.

* ``tokens_per_second``: the median over the steps after a warm-up, with quartiles and the median of
  each repetition; on CPU of the processor's time, since a shared machine spoils the clock;
* ``peak_bytes``: on CUDA of allocated tensors. On CPU of resident memory above that of the process
  when all is loaded and a tiny model has trained once; freed blocks go back to the system;
* ``predicted_bytes``: :mod:`samara.sparse.memory`'s formula (weights + state + activations +
  workspace), with the activations that forward was seen to leave for backward;
* ``flops_per_step``: of the products of forward and backward. Full fine-tuning's, divided by a
  method's, is the most that the method can gain on it at equal use of the hardware.

A case that fails is recorded with its reason. The queue goes on where it stopped: cases whose
figures are in the file are not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

from markdown_parts import error
from pool import stop_pool
from record import Record, add_json_option
from sparse_cases import METHODS, SHAPES, VARIANTS, Case, load_libraries, measure

from samara.runs import read_json

MMAP_THRESHOLD = "131072"
AHEAD = {"cpu": 0, "cuda": 2}
"""Processes that load their libraries while a case runs; on CPU that would spoil its time."""
SECONDS = 150.0
"""The most that a case may take."""


def plan(options: argparse.Namespace) -> list[Case]:
    """All cases, in the order of their weight."""
    return [
        Case(
            shape=shape,
            method=method,
            variant=variant,
            device=options.device,
            batch=options.batch,
            length=options.length,
            density=options.density,
            steps=options.steps,
            repeats=options.repeats,
        )
        for shape in options.shapes
        for variant in options.variants
        for method in options.methods
    ]


class Processes:
    """Processes for one case each, some of which get ready while others work."""

    def __init__(self, ahead: int) -> None:
        self._context = get_context("spawn")
        self._ready: deque[ProcessPoolExecutor] = deque()
        self._ahead = ahead

    def _start(self) -> None:
        pool = ProcessPoolExecutor(1, mp_context=self._context)
        pool.submit(load_libraries)
        self._ready.append(pool)

    def run(
        self, work: Callable[[Case], dict[str, Any]], case: Case, *, seconds: float
    ) -> dict[str, Any]:
        """Do a case where nothing ran before.

        Raises:
            TimeoutError: If it takes too long.
            Exception: What the case raised, or that its process died.
        """
        while len(self._ready) <= self._ahead:
            self._start()
        pool = self._ready.popleft()
        try:
            return pool.submit(work, case).result(timeout=seconds)
        finally:
            stop_pool(pool)

    def stop(self) -> None:
        """End those that wait."""
        while self._ready:
            stop_pool(self._ready.popleft())


def work_off(cases: Sequence[Case], record: Record, *, minutes: float) -> bool:
    """Do the cases, as far as there is time; whether there was."""
    processes = Processes(AHEAD[cases[0].device] if cases else 0)
    deadline = time.monotonic() + 60 * minutes
    try:
        for case in cases:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            start = time.perf_counter()
            row: dict[str, Any] = {"name": case.name, **asdict(case), "failed": None}
            try:
                row |= processes.run(measure, case, seconds=min(SECONDS, left))
            except TimeoutError:
                if left < SECONDS:
                    return False
                row["failed"] = f"took longer than {SECONDS:.0f} s"
            except Exception as error:
                row["failed"] = _reason(error)
            row["wall"] = time.perf_counter() - start
            record.add(row)
            print(line(row), flush=True)
    finally:
        processes.stop()
    return True


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300] if said else 'no message'}"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    if row["failed"]:
        return f"{row['name']:42} failed: {row['failed']}"
    formula = ""
    if row["predicted_bytes"] is not None:
        formula = f" (formula {error(row['predicted_bytes'], row['peak_bytes'])})"
    return (
        f"{row['name']:42} {row['tokens_per_second']:10,.0f} tokens/s  "
        f"peak {row['peak_bytes'] / 1e6:8,.0f} MB{formula}  "
        f"{row['flops_per_step'] / 1e12:6.2f} TFLOP a step  {row['wall']:4.0f} s"
    )


def unfinished(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Iterator[Case]:
    """Cases without figures."""
    done = {row["name"] for row in rows}
    return (case for case in cases if case.name not in done)


def main(arguments: Sequence[str]) -> None:
    """Work the plan off, or as much of it as there is time for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="left out: toy; on cuda 1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:3])
    parser.add_argument("--density", type=float, default=0.005, help="share of linear weights")
    parser.add_argument("--batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, help="tokens of a row; left out: 64; on cuda 1024")
    parser.add_argument("--steps", type=int, default=20, help="measured in each repetition")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5.0, help="stop after so long")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    options.shapes = options.shapes or (["1b"] if on_cuda else ["toy"])
    options.length = options.length or (1024 if on_cuda else 64)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = MMAP_THRESHOLD  # of the processes to come
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=options.device,
        settings=vars(options),
    )
    if options.json is not None and options.json.exists():
        record.rows.extend(row for row in read_json(options.json)["rows"] if not row["failed"])
    cases = list(unfinished(plan(options), record.rows))
    if work_off(cases, record, minutes=options.minutes):
        record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
