"""What the loss landscape looks like around a model: gradient norm, sharpness along the update.

Both are taken on fixed rows, so that candidates compare. The model and its optimizer are as before
when this is done.

LAG's title says landscape-aware, its selection looks at the loss alone; these two are what else can
be asked cheaply: one gradient and two more losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.train.objective import Objective, count_targets
from samara.train.optim import Optimizer
from samara.train.parallel import Precision, autocast


def landscape(
    model: PreTrainedModel,
    *,
    optimizer: Optimizer,
    objective: Objective,
    batches: Sequence[Batch],
    precision: Precision,
    lr: float,
) -> dict[str, float]:
    """Measure the surroundings of a model.

    Args:
        model: On its device.
        optimizer: What the next update is asked of, with the moments it has.
        objective: What is minimised.
        batches: The rows to measure on.
        precision: Of the forward pass.
        lr: Length of the update; the same for all candidates, so the peak rate.

    Returns:
        ``gradient_norm`` of the mean loss, and ``sharpness``: the second derivative of the mean
        loss along the update's direction, ``(L(w + u) - 2 L(w) + L(w - u)) / |u|²``.
    """
    parameters = optimizer.parameters
    divisor = max(1, count_targets(batches))
    weights = [parameter.detach().clone() for parameter in parameters]
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    training = model.training
    model.train(False)
    optimizer.zero_grad()
    try:
        centre = _mean_loss(model, objective, batches, precision, divisor, backward=True)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients])
        ).item()
        optimizer.set_lr(lr)
        optimizer.step()
        optimizer.zero_grad()
        steps = [p.detach() - w for p, w in zip(parameters, weights, strict=True)]
        ahead = _mean_loss(model, objective, batches, precision, divisor)
        _put(parameters, [w - step for w, step in zip(weights, steps, strict=True)])
        behind = _mean_loss(model, objective, batches, precision, divisor)
        length = sum(float((step.double() ** 2).sum()) for step in steps)
    finally:
        optimizer.zero_grad()
        _put(parameters, weights)
        optimizer.load_state_dict(moments)
        model.train(training)
    return {
        "gradient_norm": norm,
        "sharpness": (ahead - 2.0 * centre + behind) / length if length else 0.0,
    }


def _mean_loss(
    model: PreTrainedModel,
    objective: Objective,
    batches: Sequence[Batch],
    precision: Precision,
    divisor: int,
    *,
    backward: bool = False,
) -> float:
    total = 0.0
    with torch.set_grad_enabled(backward):
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with autocast(model.device, precision):
                loss = objective(model, on_device).loss / divisor
            if backward:
                torch.autograd.backward(loss)
            total += loss.item()
    return total


def _put(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
