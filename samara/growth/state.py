"""A model in training as growth sees it: design, weights, optimizer state; nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from samara.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class GrowthState:
    """What a growth operator takes and gives; no operator changes one in place.

    Attributes:
        design: The model, expanded: one entry per layer, and a vocabulary size.
        weights: By parameter name, a tied matrix once, as in checkpoints
            (:func:`samara.train.checkpoint.named_weights`).
        optimizer: ``{parameter name}.{key}`` as :meth:`samara.train.optim.Optimizer.state_dict`
            gives it: ``exp_avg``, ``exp_avg_sq`` and ``step`` of AdamW, ``momentum_buffer`` of
            Muon. A parameter without entries starts afresh. None: there is none.
        betas: AdamW's decay rates, under Muon those of its AdamW part; None without ``optimizer``.
            How much a young entry may move depends on them.
    """

    design: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None = None
    betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        assert self.design == self.design.expand(), "growth works on expanded designs"
        assert self.optimizer is None or self.betas is not None, "moments come with their betas"
