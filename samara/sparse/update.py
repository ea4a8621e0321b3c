"""The update of selected weights: AdamW on float32 values, written back into the frozen weights.

Per selected entry there are the value (4 bytes), two moments (8), the position (4), the base
model's number (as stored: 2 in bfloat16) and, in backward, the gradient (4); per frozen weight
nothing. The weights themselves hold the rounded values at all times, so forward, evaluation and
saving need no merge.

Why values in float32: a bfloat16 weight of 0.02 has steps of about 1e-4; most updates are smaller
and would be rounded away one by one. Why moments in float32, too: in 8 bits they would save 6 bytes
an entry, at half a percent of a billion weights 29 MB beside 2.5 GB of weights alone.

AdamW: arXiv 1711.05101, in the order of operations of ``torch.optim.AdamW``, which training with
all entries selected reproduces bit for bit. What differs: weight decay pulls towards the base
model's numbers, and each entry has its own count of steps, so that entries that join later
(:mod:`samara.sparse.expansion`) start their moments afresh while the others keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from samara.errors import CheckpointError
from samara.sparse.config import SparseAdamWConfig
from samara.sparse.support import TensorSupport

INDEX, VALUES, MEAN, SQUARE, STEPS = "index", "values", "exp_avg", "exp_avg_sq", "step"
KEYS = (INDEX, VALUES, MEAN, SQUARE, STEPS)
WRITTEN_AT_ONCE = 2**22
"""Entries that are written together: fewer kernels than one tensor at a time, and at 12 bytes each
on the way less than the activations that are gone by then."""


class Selected:
    """The selected entries of one weight, with the state that training keeps of them.

    Attributes:
        name: The weight's name in the checkpoint.
        weight: The frozen weight; holds the rounded values.
        support: Which entries.
        index: Their flat positions, int32 on the weight's device.
        base: The weight's numbers at these positions before training, as stored.
        values: The trained values, float32 (float64 of a float64 weight): what autograd sees.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        steps: Updates done: one number (), or one for each entry (k,) once entries joined later.
    """

    def __init__(self, name: str, weight: nn.Parameter, support: TensorSupport) -> None:
        assert weight.is_contiguous(), f"{name}: flat positions need a contiguous weight"
        assert weight.numel() < 2**31, f"{name}: positions are kept as int32"
        assert tuple(weight.shape) == support.shape, f"{name}: the support is of another shape"
        self.name, self.weight, self.support = name, weight, support
        self.index = support.index.to(device=weight.device, dtype=torch.int32)
        self.base = self.current()
        exact = self.base.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        self.values = nn.Parameter(exact)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(exact), torch.zeros_like(exact)
        self.steps = torch.zeros(())

    def current(self) -> Tensor:
        """The weight's numbers at the selected positions."""
        return self.weight.detach().flatten().index_select(0, self.index)

    @torch.no_grad()
    def write(self, numbers: Tensor) -> None:
        """Put numbers into the weight, rounded to nearest; every other entry stays."""
        stored = numbers.to(self.weight.dtype)
        self.weight.view(-1).index_copy_(0, self.index.long(), stored)

    @torch.no_grad()
    def grown(self, support: TensorSupport) -> Selected:
        """The same weight with more entries; those of before keep values, moments and steps."""
        place = torch.searchsorted(support.index, self.support.index)
        kept = support.index[place.clamp(max=support.index.numel() - 1)]
        assert torch.equal(kept, self.support.index), f"{self.name}: a support only grows"
        place = place.to(self.weight.device)
        # The new entries were never touched: what is in the weight there is the base's.
        larger = Selected(self.name, self.weight, support)
        larger.base[place] = self.base
        larger.values[place] = self.values
        larger.exp_avg[place], larger.exp_avg_sq[place] = self.exp_avg, self.exp_avg_sq
        larger.steps = self.steps
        if support.index.numel() > self.support.index.numel():
            larger.steps = torch.zeros_like(larger.exp_avg)
            larger.steps[place] = self.steps.to(larger.steps)
        return larger

    @property
    def state_bytes(self) -> int:
        """Bytes that these entries take beside the weight, gradients included."""
        tensors = [self.index, self.base, self.values, self.values, self.exp_avg, self.exp_avg_sq]
        if self.steps.dim():
            tensors.append(self.steps)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SparseAdamW:
    """Updates the selected entries of a model; trains in the place of ``train.optim.Optimizer``.

    Args:
        selected: By name; read anew at each step, so that it may grow.
        config: Betas, epsilon and weight decay.
        grow: Selects the given positions too; called when a state of more entries is loaded. Left
            out: such a state is refused.
    """

    def __init__(
        self,
        selected: Mapping[str, Selected],
        config: SparseAdamWConfig,
        *,
        grow: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        self._selected = selected
        self._config = config
        self._grow = grow
        self._lr = config.lr

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The values of all selected entries, one parameter a tensor."""
        return [entry.values for entry in self._selected.values()]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self._lr = lr

    @torch.no_grad()
    def step(self) -> None:
        """Update the values from their gradients, and write them into the weights."""
        touched = [entry for entry in self._selected.values() if entry.values.grad is not None]
        alike = [entry for entry in touched if not entry.steps.dim()]
        for entry in touched:
            entry.steps += 1
        self._decay(touched)
        self._update_alike(alike)
        for entry in touched:
            if entry.steps.dim():
                self._update_each(entry)
        for group in _groups(touched):
            _write_values(group)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for entry in self._selected.values():
            entry.values.grad = None

    def _decay(self, touched: Sequence[Selected]) -> None:
        rate = self._lr * self._config.weight_decay
        if rate:
            for entry in touched:
                entry.values.lerp_(entry.base.to(entry.values.dtype), rate)

    def _update_alike(self, entries: Sequence[Selected]) -> None:
        """AdamW where all entries of a tensor have the same count of steps, a few kernels for all.

        Operation by operation as ``torch.optim.AdamW`` without ``fused``.
        """
        if not entries:
            return
        beta1, beta2 = self._config.betas
        values: list[Tensor] = [entry.values for entry in entries]
        grads: list[Tensor] = [v.grad for v in values if v.grad is not None]
        means, squares = [e.exp_avg for e in entries], [e.exp_avg_sq for e in entries]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        steps = [float(entry.steps) for entry in entries]  # on the CPU: no synchronisation
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, self._config.eps)
        rates = [-self._lr / (1 - beta1**step) for step in steps]
        torch._foreach_addcdiv_(values, means, roots, rates)

    def _update_each(self, entry: Selected) -> None:
        """AdamW where entries of one tensor have different counts of steps."""
        beta1, beta2 = self._config.betas
        grad = entry.values.grad
        assert grad is not None
        entry.exp_avg.lerp_(grad, 1 - beta1)
        entry.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (entry.exp_avg_sq.sqrt() / (1 - beta2**entry.steps).sqrt()).add_(self._config.eps)
        mean = entry.exp_avg / (1 - beta1**entry.steps)
        entry.values.addcdiv_(mean, root, value=-self._lr)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on from the base model: ``{tensor name}.{key}``, live tensors.

        Keys: ``index``, ``values``, ``exp_avg``, ``exp_avg_sq``, ``step``.
        """
        return {
            f"{name}.{key}": tensor
            for name, entry in self._selected.items()
            for key, tensor in (
                (INDEX, entry.index),
                (VALUES, entry.values),
                (MEAN, entry.exp_avg),
                (SQUARE, entry.exp_avg_sq),
                (STEPS, entry.steps),
            )
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace values and moments, and write the values into the weights.

        Raises:
            CheckpointError: If the state is of other entries; nothing is changed then.
        """
        if self._grow is not None:
            self._grow(support_of(state))
        self._check(state)
        for name, entry in self._selected.items():
            entry.values.copy_(state[f"{name}.{VALUES}"])
            entry.exp_avg.copy_(state[f"{name}.{MEAN}"])
            entry.exp_avg_sq.copy_(state[f"{name}.{SQUARE}"])
            steps = state[f"{name}.{STEPS}"]
            entry.steps = steps.to(entry.exp_avg.device if steps.dim() else "cpu", copy=True)
            entry.write(entry.values)

    def _check(self, state: Mapping[str, Tensor]) -> None:
        expected = {f"{name}.{key}" for name in self._selected for key in KEYS}
        different = sorted(expected.symmetric_difference(state))
        if different:
            where = "missing" if different[0] in expected else "not of this support"
            raise CheckpointError(f"optimizer state: {different[0]} is {where}")
        for name, entry in self._selected.items():
            index = state[f"{name}.{INDEX}"]
            if not torch.equal(index.cpu().long(), entry.support.index):
                raise CheckpointError(
                    f"optimizer state: the entries of {name} are not those selected here"
                )


def _groups(entries: Sequence[Selected]) -> Iterator[list[Selected]]:
    """Entries of one dtype and device in groups of a bounded size; a larger one is alone."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Selected]] = {}
    for entry in entries:
        kinds.setdefault((entry.weight.dtype, entry.weight.device), []).append(entry)
    for alike in kinds.values():
        group: list[Selected] = []
        size = 0
        for entry in alike:
            if group and size + entry.values.numel() > WRITTEN_AT_ONCE:
                yield group
                group, size = [], 0
            group.append(entry)
            size += entry.values.numel()
        yield group


@torch.no_grad()
def _write_values(group: Sequence[Selected]) -> None:
    """:meth:`Selected.write` of each, with one rounding and one widening of positions for all."""
    sizes = [entry.values.numel() for entry in group]
    stored = torch.cat([entry.values for entry in group]).to(group[0].weight.dtype)
    index = torch.cat([entry.index for entry in group]).long()
    pieces = zip(group, torch.split(stored, sizes), torch.split(index, sizes), strict=True)
    for entry, numbers, places in pieces:
        entry.weight.view(-1).index_copy_(0, places, numbers)


def support_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The positions in a :meth:`SparseAdamW.state_dict`, int64 by tensor name."""
    end = f".{INDEX}"
    return {
        key.removesuffix(end): index.cpu().long()
        for key, index in state.items()
        if key.endswith(end)
    }
