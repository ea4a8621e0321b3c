"""What processes that train one model tell each other, besides gradients.

Every function is called by all of them together, in the same order; in a process that trains alone
each does what its name says without anybody to talk to. Files are read and written by the first
process only, so the others need not see its disk. Plain data travel as JSON, tensors as they are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor

LOST = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe")
"""What torch's messages say when another process is gone: of gloo it is a plain RuntimeError."""


def together() -> bool:
    """Whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process reads and writes files for all."""
    return not together() or distributed.get_rank() == 0


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error of torch means that another process of the run has ended."""
    return isinstance(error, distributed.DistError) or any(part in str(error) for part in LOST)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process do what is inside before the others: they find it done."""
    if together() and not is_first():
        distributed.barrier()
    yield
    if together() and is_first():
        distributed.barrier()


def total(numbers: list[int]) -> list[int]:
    """Add integers up over the processes, each for itself."""
    if not together():
        return numbers
    summed = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(summed)
    return [int(number) for number in summed.tolist()]


def share(data: Any) -> Any:
    """Give all processes the plain data of the first."""
    if not together():
        return data
    text = json.dumps(data).encode() if is_first() else b""
    (size,) = total([len(text)])
    buffer = torch.empty(size, dtype=torch.uint8)
    if is_first():
        buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    distributed.broadcast(buffer, src=0)
    return json.loads(bytes(buffer.tolist()))


def from_first(read: Callable[[], Tensor], *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that the first process reads, on the CPU of all.

    Args:
        read: Called in the first process only.
        shape: Of the tensor.
        dtype: Of the tensor.
    """
    if not together():
        return read()
    value = read().contiguous() if is_first() else torch.empty(shape, dtype=dtype)
    distributed.broadcast(value, src=0)
    return value


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors in full for the first process; an empty mapping for the others.

    What is in shards is gathered one tensor at a time and kept on the first process's CPU; what is
    not is given as it is.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor().detach()
            full = full.cpu() if is_first() else full
        if is_first():
            gathered[name] = full
    return gathered


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a full tensor, laid out as a parameter is: on its device, in its shards."""
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,  # every process has the whole value
        )
    return value.to(parameter.device, copy=True)


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file that the first process has, read one by one when asked for.

    Attributes:
        shapes: By name.
    """

    def __init__(self, file: Any) -> None:
        """Read the names, and tell them to all.

        Args:
            file: The open file; None in other processes than the first.
        """
        self._file = file
        header = {} if file is None else {name: _described(file, name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        self._header: dict[str, tuple[list[int], str]] = share(header)
        self.shapes = {name: tuple(shape) for name, (shape, _) in self._header.items()}

    def __getitem__(self, name: str) -> Tensor:
        _, dtype = self._header[name]
        return from_first(
            lambda: self._file.get_tensor(name),
            shape=self.shapes[name],
            dtype=getattr(torch, dtype),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def _described(file: Any, name: str) -> tuple[list[int], str]:
    part = file.get_slice(name)
    shape = list(part.get_shape())
    empty = file.get_tensor(name) if not shape else part[:0]
    return shape, str(empty.dtype).removeprefix("torch.")


@contextlib.contextmanager
def open_stored(file: Path) -> Iterator[Stored]:
    """Open a safetensors file that need be there for the first process only."""
    if not is_first():
        yield Stored(None)
        return
    with safe_open(file, framework="pt") as opened:
        yield Stored(opened)
