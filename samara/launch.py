"""How this process was started: alone, or by ``torchrun`` among several that train together.

Read from the variables that ``torchrun`` sets. No torch here: the command line asks before torch is
imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process among those that ``torchrun`` started.

    Attributes:
        rank: This process among all of them; the first, 0, writes the run folder.
        world_size: Their number over all machines.
        local_rank: This process among those of its machine: the number of its GPU.
    """

    rank: int
    world_size: int
    local_rank: int


def launch() -> Launch | None:
    """What ``torchrun`` says of this process; None if it did not start it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return None
    rank, world_size, local_rank = (int(os.environ[name]) for name in names[:3])
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank)
