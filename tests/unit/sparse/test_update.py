"""SparseAdamW is AdamW on the selected entries, and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from samara.errors import CheckpointError, ConfigError
from samara.sparse import update
from samara.sparse.attach import Attachment, linear_weights
from samara.sparse.config import SparseAdamWConfig
from samara.sparse.support import Support, TensorSupport, whole
from samara.sparse.update import Selected, SparseAdamW, support_of
from samara.train.checkpoint import TrainingState
from samara.train.loop import train

LR, BETAS, EPS, STEPS = 3e-3, (0.9, 0.97), 1e-8, 5


def settings(**more):
    return SparseAdamWConfig(lr=LR, betas=BETAS, eps=EPS, **more)


def everything(model):
    return Support(tensors={n: whole(tuple(p.shape)) for n, p in model.named_parameters()})


def some(model, *, share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in linear_weights(model):
        shape = tuple(model.get_parameter(name).shape)
        number = torch.Size(shape).numel()
        index = torch.randperm(number, generator=generator)[: int(share * number)].sort().values
        tensors[name] = TensorSupport(shape=shape, index=index)
    return Support(tensors=tensors)


def train_sparse(models, kind, model, support, *, path="auto", steps=STEPS, clip=None, **more):
    with Attachment(model, support, gradient_path=path) as attachment:
        updater = SparseAdamW(attachment.selected, settings(**more))
        run(models, kind, model, updater, steps=steps, clip=clip)
        return attachment, updater


def run(models, kind, model, updater, *, steps, clip=None, start=0):
    batches = [[models.batch(kind, seed=s)] for s in range(start, start + steps)]
    train(
        model,
        objective=models.objective(kind),
        optimizer=updater,
        learning_rate=lambda step: LR * (1 + step % 3) / 3,
        batches=batches,
        state=TrainingState(step=start),
        num_steps=start + steps,
        clip_grad_norm=clip,
    )


class MaskedAdamW:
    """torch.optim.AdamW on dense weights, with the gradient outside the support set to 0."""

    def __init__(self, model, support):
        self._model = model
        named = {n: p for n, p in model.named_parameters() if n in support.tensors}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in named)
        self.parameters = list(named.values())
        self._masks = {}
        for name, parameter in named.items():
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            mask[support.tensors[name].index] = True
            self._masks[parameter] = mask.view_as(parameter)
        self._adamw = torch.optim.AdamW(
            self.parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, foreach=False
        )

    def set_lr(self, lr):
        for group in self._adamw.param_groups:
            group["lr"] = lr

    def step(self):
        for parameter, mask in self._masks.items():
            parameter.grad[~mask] = 0.0
        self._adamw.step()

    def zero_grad(self):
        self._adamw.zero_grad()


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "bert", "samara", "samara_cola"])
def test_all_entries_selected_is_full_fine_tuning_bit_for_bit(models, kind):
    full, ours = models.build(kind), models.build(kind)
    run(models, kind, full, MaskedAdamW(full, everything(full)), steps=STEPS)
    train_sparse(models, kind, ours, everything(ours), path="dense")
    for (name, expected), found in zip(full.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "samara_cola"])
def test_the_fast_paths_train_like_it(models, kind):
    # Adam divides by |g|: an entry whose gradient is round-off may step either way.
    full, ours = models.build(kind).double(), models.build(kind).double()
    run(models, kind, full, MaskedAdamW(full, everything(full)), steps=STEPS)
    train_sparse(models, kind, ours, everything(ours))
    for (name, expected), found in zip(full.named_parameters(), ours.parameters(), strict=True):
        if name.endswith(("k_proj.bias", "key.bias", "c_attn.bias")):
            continue  # softmax does not see a bias of the keys: its gradient is round-off alone
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "samara_cola"])
@pytest.mark.parametrize("path", ["auto", "dense"])
def test_some_entries_selected_is_masked_adamw(models, kind, path):
    masked, ours = models.build(kind), models.build(kind)
    support = some(ours)
    run(models, kind, masked, MaskedAdamW(masked, support), steps=STEPS)
    train_sparse(models, kind, ours, support, path=path)
    for (name, expected), found in zip(masked.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_only_selected_entries_move_and_dtypes_stay(models):
    for dtype in (torch.float32, torch.bfloat16):
        model, before = models.build("llama", dtype=dtype), models.build("llama", dtype=dtype)
        support = some(model)
        attachment, _ = train_sparse(models, "llama", model, support)
        for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
            assert now.dtype == dtype
            moved = (now != then).flatten().nonzero().flatten()
            allowed = support.tensors[name].index if name in support.tensors else moved[:0]
            assert set(moved.tolist()) <= set(allowed.tolist()), name
        assert any((e.current() != e.base).any() for e in attachment.selected.values())
        for entry in attachment.selected.values():
            assert entry.values.dtype == torch.float32
            assert torch.equal(entry.values.to(dtype), entry.current())


def test_small_steps_add_up_in_bfloat16(models):
    model = models.build("llama", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    support = Support(tensors={name: TensorSupport(shape=(20, 16), index=torch.arange(4))})
    with Attachment(model, support) as attachment:
        updater = SparseAdamW(attachment.selected, SparseAdamWConfig(lr=1e-5, betas=(0.0, 0.0)))
        entry = attachment.selected[name]
        entry.values.data.fill_(0.5)
        for _ in range(300):
            entry.values.grad = torch.ones(4)
            updater.step()
    # Each step is a hundredth of a bfloat16's; rounded one by one, nothing would have moved.
    assert entry.current().tolist() == [0.49609375] * 4  # 0.5 - 2 steps of 2^-9


def test_restore_gives_the_base_back_and_detach_the_flags(models):
    model, before = models.build("bert"), models.build("bert")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    attachment, _ = train_sparse(models, "bert", model, everything(model), path="auto")
    assert [p.requires_grad for p in model.parameters()] == flags
    attachment.restore()
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)


def test_clipping_uses_the_norm_of_the_selected_gradients(models):
    model = models.build("llama")
    support = some(model)
    with Attachment(model, support) as attachment:
        updater = SparseAdamW(attachment.selected, settings())
        models.objective("llama")(model, models.batch("llama")).loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in updater.parameters])
        by_hand = torch.cat([e.values.grad for e in attachment.selected.values()]).norm()
        torch.testing.assert_close(norm, by_hand)
        torch.nn.utils.clip_grads_with_norm_(updater.parameters, 0.5 * float(norm), norm)
        clipped = torch.cat([e.values.grad for e in attachment.selected.values()]).norm()
        torch.testing.assert_close(clipped, 0.5 * norm)


def test_weight_decay_pulls_towards_the_base(models):
    model = models.build("llama")
    support = some(model)
    with Attachment(model, support) as attachment:
        updater = SparseAdamW(attachment.selected, settings(weight_decay=0.5))
        updater.set_lr(0.1)
        for entry in attachment.selected.values():
            entry.values.data += 1.0
            entry.values.grad = torch.zeros_like(entry.values)
        updater.step()
        for entry in attachment.selected.values():
            torch.testing.assert_close(
                entry.values.detach() - entry.base, torch.full_like(entry.base, 0.95)
            )


def test_resuming_equals_a_straight_run_bit_for_bit(models):
    straight = models.build("llama")
    support = some(straight)
    train_sparse(models, "llama", straight, support, steps=6)
    first = models.build("llama")
    with Attachment(first, support) as attachment:
        updater = SparseAdamW(attachment.selected, settings())
        run(models, "llama", first, updater, steps=3)
        state = {key: tensor.detach().clone() for key, tensor in updater.state_dict().items()}
    second = models.build("llama")  # the base model again: the state holds all that changed
    with Attachment(second, support) as attachment:
        updater = SparseAdamW(attachment.selected, settings())
        updater.load_state_dict(state)
        run(models, "llama", second, updater, steps=3, start=3)
    for (name, expected), found in zip(
        straight.named_parameters(), second.parameters(), strict=True
    ):
        assert torch.equal(expected, found), name


def test_a_support_that_grows_keeps_what_it_has(models):
    model = models.build("llama")
    small, other = some(model, share=0.1), some(model, share=0.1, seed=1)
    large = small.including(other)
    with Attachment(model, small) as attachment:
        updater = SparseAdamW(attachment.selected, settings())
        run(models, "llama", model, updater, steps=3)
        before = {
            n: (e.values.detach().clone(), e.exp_avg.clone(), e.base)
            for n, e in attachment.selected.items()
        }
        attachment.grow(large)
        for name, entry in attachment.selected.items():
            place = torch.searchsorted(entry.support.index, small.tensors[name].index)
            values, mean, base = before[name]
            assert torch.equal(entry.values.detach()[place], values)
            assert torch.equal(entry.exp_avg[place], mean)
            assert torch.equal(entry.base[place], base)
            assert entry.steps[place].unique().tolist() == [3.0]
            assert entry.steps.unique().tolist() == [0.0, 3.0]
            assert torch.equal(entry.values.detach(), entry.current())
        run(models, "llama", model, updater, steps=2, start=3)
        assert attachment.support.support_id == large.support_id
        entry = next(iter(attachment.selected.values()))
        assert entry.steps.unique().tolist() == [2.0, 5.0]
        attachment.restore()
    for now, then in zip(model.parameters(), models.build("llama").parameters(), strict=True):
        assert torch.equal(now, then)


def test_entries_that_join_later_update_as_if_they_began_then(models):
    """Counts of steps by entry: torch's AdamW, begun when the entry joined, is the reference."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1, 4))
    model = torch.nn.Module()
    model.weight = weight
    old = TensorSupport(shape=(1, 4), index=torch.tensor([1, 3]))
    new = TensorSupport(shape=(1, 4), index=torch.tensor([0, 1, 2, 3]))
    entry = Selected("weight", weight, old)
    references = {
        place: torch.nn.Parameter(weight.detach()[0, place].clone()) for place in range(4)
    }
    adamw = {
        p: torch.optim.AdamW([v], lr=LR, betas=BETAS, weight_decay=0.0)
        for p, v in references.items()
    }
    selected = {"weight": entry}
    updater = SparseAdamW(selected, settings())
    for step in range(6):
        if step == 3:
            entry = selected["weight"] = entry.grown(new)
        grads = torch.randn(4)
        entry.values.grad = grads[entry.support.index]
        updater.set_lr(LR)
        updater.step()
        for place in entry.support.index.tolist():
            references[place].grad = grads[place].clone()
            adamw[place].step()
    expected = torch.stack([references[place].detach() for place in range(4)])
    torch.testing.assert_close(weight.detach()[0], expected, rtol=1e-6, atol=1e-7)


def test_states_and_supports_that_do_not_fit_are_refused(models):
    model = models.build("llama")
    support = some(model)
    with Attachment(model, support) as attachment:
        updater = SparseAdamW(attachment.selected, settings())
        state = updater.state_dict()
        assert set(support_of(state)) == set(support.tensors)
        name = next(iter(support.tensors))
        with pytest.raises(CheckpointError, match="step is missing"):
            updater.load_state_dict({k: v for k, v in state.items() if k != f"{name}.step"})
        with pytest.raises(CheckpointError, match="is not of this support"):
            updater.load_state_dict({**state, "other.values": torch.zeros(1)})
        moved = {**state, f"{name}.index": state[f"{name}.index"] + 1}
        with pytest.raises(CheckpointError, match=f"entries of {name} are not those"):
            updater.load_state_dict(moved)
    with pytest.raises(ConfigError, match=r"the model has no model\.layers\.9.*did you mean"):
        Attachment(model, Support(tensors={"model.layers.9.mlp.up_proj.weight": whole((20, 16))}))
    with pytest.raises(ConfigError, match=r"is \(3, 3\) there, \(20, 16\) in this model"):
        Attachment(model, Support(tensors={"model.layers.0.mlp.up_proj.weight": whole((3, 3))}))


def test_checkpointing_and_compile_change_nothing(models):
    plain, other = models.build("samara"), models.build("samara")
    support = some(plain)
    train_sparse(models, "samara", plain, support)
    other.gradient_checkpointing_enable()
    train_sparse(models, "samara", other, support)
    for expected, found in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, found)
    compiled = models.build("samara")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with Attachment(compiled, support) as attachment:
        compiled.base_model.compile(backend=counter)
        run(models, "samara", compiled, SparseAdamW(attachment.selected, settings()), steps=STEPS)
    assert counter.frame_count == 1  # weights written in place: no second compilation
    for expected, found in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_paths_agree_in_bfloat16(models):
    model = models.build("llama", dtype=torch.bfloat16)
    support = some(model)
    found = {}
    for path in ("auto", "dense"):
        with Attachment(model, support, gradient_path=path) as attachment:
            models.objective("llama")(model, models.batch("llama")).loss.backward()
            found[path] = {n: e.values.grad for n, e in attachment.selected.items()}
    for name, dense in found["dense"].items():
        # Autograd's dense gradient is rounded to bfloat16, and so is a tile of ours.
        torch.testing.assert_close(
            found["auto"][name], dense, rtol=2e-2, atol=1e-2 * float(dense.abs().max())
        )


def test_autocast(models):
    model, before = models.build("llama"), models.build("llama")
    support = some(model)
    with Attachment(model, support) as attachment:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = models.objective("llama")(model, models.batch("llama")).loss
        loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reference = models.objective("llama")(before, models.batch("llama")).loss
        reference.backward()
        for name, entry in attachment.selected.items():
            dense = before.get_parameter(name).grad.flatten()[entry.support.index]
            torch.testing.assert_close(
                entry.values.grad, dense, rtol=2e-2, atol=2e-2 * float(dense.abs().max())
            )


def test_tensors_are_written_in_groups_of_bounded_size_and_one_dtype(monkeypatch):
    monkeypatch.setattr(update, "WRITTEN_AT_ONCE", 5)

    def selected(name, size, dtype):
        weight = torch.nn.Parameter(torch.randn(size, 4).to(dtype), requires_grad=False)
        index = torch.arange(0, 4 * size, 4)
        support = TensorSupport(shape=(size, 4), index=index)
        return update.Selected(name, weight, support)

    sizes = ((2, torch.float32), (9, torch.bfloat16), (3, torch.float32), (1, torch.float32))
    entries = [selected(f"w{i}", size, dtype) for i, (size, dtype) in enumerate(sizes)]
    groups = list(update._groups(entries))
    assert [[e.name for e in group] for group in groups] == [["w0", "w2"], ["w3"], ["w1"]]
    before = [entry.weight.clone() for entry in entries]
    for entry in entries:
        entry.values.data += 1.0
    for group in groups:
        update._write_values(group)
    for entry, old in zip(entries, before, strict=True):
        assert torch.equal(entry.current(), entry.values.to(old.dtype))
        assert torch.equal(entry.weight[:, 1:], old[:, 1:])
