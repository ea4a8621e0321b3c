"""Where a transformer's activations are taken: before and after every linear of every layer.

The linears are found by what they are (``nn.Linear``, GPT-2's ``Conv1D``, CoLA's low-rank ones) and
where they stand: under a numbered layer. So any decoder or encoder of ``transformers`` can be
looked into; embeddings and heads, which belong to no layer, are left out.

Of a low-rank linear y = silu(x A) B, the bottleneck is looked at too, before its nonlinearity
(u = x A, ``bottleneck``) and after it (z = silu(u), ``activated``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from samara.measure.spectrum import Covariance
from samara.model.cola import LowRankLinear

Space = Literal["input", "bottleneck", "activated", "output"]
SPACES: tuple[Space, ...] = ("input", "bottleneck", "activated", "output")

_IN_A_LAYER = re.compile(r"(.*?)(?:^|\.)(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One linear of one layer."""

    layer: int
    """From 0."""
    projection: str
    """The shortest end of its name that no other linear of the layer has: ``q_proj``."""
    module: nn.Module


@dataclass(frozen=True)
class Place:
    """One kind of activations at a site."""

    layer: int
    projection: str
    space: Space


def find_sites(model: nn.Module) -> list[Site]:
    """The linears of a model's layers, in their order."""
    layers: dict[tuple[str, int], dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        inside = _IN_A_LAYER.fullmatch(name)
        if inside is not None and isinstance(module, nn.Linear | Conv1D | LowRankLinear):
            layers[inside[1], int(inside[2])][inside[3]] = module
    return [
        Site(layer=number, projection=short, module=linears[name])
        for number, linears in enumerate(layers.values())
        for name, short in _shortened(linears).items()
    ]


def _shortened(names: Iterable[str]) -> dict[str, str]:
    """Each name -> its shortest end, in whole parts, that no other name has."""
    names = list(names)

    def ends(name: str) -> Iterator[str]:
        parts = name.split(".")
        yield from (".".join(parts[-count:]) for count in range(1, len(parts) + 1))

    shared = [end for name in names for end in set(ends(name))]
    return {
        name: next((end for end in ends(name) if shared.count(end) == 1), name) for name in names
    }


class Recorder:
    """Adds up what passes through sites while the model runs inside :meth:`attached`.

    Linears that read one tensor (q, k and v; gate and up) share its sums.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = list(sites)
        self._sums: dict[Place, Covariance] = {}
        self._newest: tuple[Tensor, Place] | None = None

    @property
    def sums(self) -> Mapping[Place, Covariance]:
        """What was added up, place by place."""
        return self._sums

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the model; the hooks go when the block ends."""
        handles = [site.module.register_forward_hook(self._hook(site)) for site in self._sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._newest = None

    def _hook(self, site: Site) -> Any:
        @torch.no_grad()
        def listen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0]
            self._add_input(Place(site.layer, site.projection, "input"), x)
            if isinstance(module, LowRankLinear):
                u = module.down(x)
                self._add(Place(site.layer, site.projection, "bottleneck"), u)
                self._add(Place(site.layer, site.projection, "activated"), functional.silu(u))
            self._add(Place(site.layer, site.projection, "output"), output)

        return listen

    def _add_input(self, place: Place, x: Tensor) -> None:
        if self._newest is not None and self._newest[0] is x:
            self._sums[place] = self._sums[self._newest[1]]
            return
        self._newest = (x, place)
        self._add(place, x)

    def _add(self, place: Place, x: Tensor) -> None:
        if place not in self._sums:
            self._sums[place] = Covariance(x.shape[-1], x.device)
        self._sums[place].add(x)
