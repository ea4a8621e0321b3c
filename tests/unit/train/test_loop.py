from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from samara.data.rows import Batch
from samara.errors import NonFiniteLossError, Stopped
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import TrainingState
from samara.train.config import AdamW
from samara.train.loop import Costs, Hooks, train
from samara.train.objective import CausalLM, Sums, count_targets
from samara.train.optim import Optimizer
from samara.train.stop import StopSignal

MakeModel = Callable[..., SamaraForCausalLM]
MakeBatches = Callable[..., list[list[Batch]]]


def run(
    model: PreTrainedModel,
    steps: list[list[Batch]],
    *,
    lr: float = 0.02,
    state: TrainingState | None = None,
    **options: Any,
) -> TrainingState:
    """Train over all of ``steps`` at a constant rate."""
    state = state or TrainingState()
    train(
        model,
        objective=options.pop("objective", CausalLM()),
        optimizer=options.pop("optimizer", None) or Optimizer(model, AdamW(lr=lr)),
        learning_rate=options.pop("learning_rate", lambda _: lr),
        batches=steps,
        state=state,
        num_steps=state.step + len(steps),
        **options,
    )
    return state


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def reference_loss(model: PreTrainedModel, batch: Batch, z_loss: float = 0.0) -> Tensor:
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    loss = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    counted = batch["targets"] != -100
    return loss + z_loss * torch.logsumexp(logits, dim=-1)[counted].square().mean()


def test_loss_falls(make_model: MakeModel, make_batches: MakeBatches) -> None:
    records: list[dict[str, Any]] = []
    batch = make_batches(1)[0]

    run(make_model(), [batch] * 30, hooks=Hooks(log=records.append))

    assert records[0]["loss"] == pytest.approx(math.log(61), rel=0.2)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]


def test_plain_hugging_face_decoder_trains(make_batches: MakeBatches) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    batch = make_batches(1)[0]
    expected = float(reference_loss(model, batch[0]).detach())
    records: list[dict[str, Any]] = []

    run(model, [batch] * 10, hooks=Hooks(log=records.append))

    assert records[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]


def test_gradient_is_that_of_the_mean_loss(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    model, reference = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    batch = make_batches(1)[0]
    loss = reference_loss(reference, batch[0], z_loss=0.01)
    loss.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    seen: dict[str, Tensor] = {}
    optimizer = Optimizer(model, AdamW(lr=0.0001))
    step = optimizer.step

    def spy() -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        step()

    optimizer.step = spy  # type: ignore[method-assign]
    run(model, [batch], optimizer=optimizer, objective=CausalLM(z_loss=0.01))

    for name, grad in grads.items():
        torch.testing.assert_close(seen[name], grad, rtol=1e-10, atol=1e-12)


def test_z_loss_is_minimised_but_not_reported(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    batch = make_batches(1)[0]
    plain: list[dict[str, Any]] = []
    regular: list[dict[str, Any]] = []
    model = make_model()

    run(make_model(), [batch], hooks=Hooks(log=plain.append))
    run(model, [batch], objective=CausalLM(z_loss=0.1), hooks=Hooks(log=regular.append))

    assert regular[0]["loss"] == plain[0]["loss"]
    assert regular[0]["grad_norm"] != plain[0]["grad_norm"]


def test_large_gradients_are_clipped_to_the_norm(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    norms: list[float] = []
    records: list[dict[str, Any]] = []
    model = make_model()
    optimizer = Optimizer(model, AdamW(lr=0.01))
    step = optimizer.step

    def spy() -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in optimizer.parameters]).norm()))
        step()

    optimizer.step = spy  # type: ignore[method-assign]
    for limit in (0.01, 1e9, None):
        options = {"optimizer": optimizer, "clip_grad_norm": limit}
        run(model, make_batches(1), hooks=Hooks(log=records.append), **options)

    assert records[0]["grad_norm"] > 0.1
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] == pytest.approx(records[1]["grad_norm"], rel=1e-5)
    assert norms[2] == pytest.approx(records[2]["grad_norm"], rel=1e-5)


def test_counts_only_counted_targets(make_batches: MakeBatches) -> None:
    micro_batches = make_batches(1, micro_batches=3)[0]

    expected = sum(int((b["targets"] >= 0).sum()) for b in micro_batches)

    assert count_targets(micro_batches) == expected


def test_a_step_of_padding_alone_changes_nothing(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    model = make_model()
    before = weights(model)
    batch = make_batches(1)[0]
    batch[0]["targets"].fill_(-100)

    optimizer = Optimizer(model, AdamW(lr=0.01, weight_decay=0.0))
    state = run(model, [batch], optimizer=optimizer)

    assert state.train_loss == 0.0
    assert same(weights(model), before)


def test_learning_rate_of_each_step(make_model: MakeModel, make_batches: MakeBatches) -> None:
    records: list[dict[str, Any]] = []
    model = make_model()
    before = weights(model)

    run(
        model,
        make_batches(1),
        learning_rate=lambda step: 0.5 * step,
        hooks=Hooks(log=records.append),
    )

    assert records[0]["lr"] == 0.0
    assert same(weights(model), before)


def test_records_cover_the_steps_since_the_last_one(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    steps = make_batches(5)
    every: list[dict[str, Any]] = []
    sparse: list[dict[str, Any]] = []
    costs = Costs(flops_per_token=10.0, useful_flops_per_token=8.0, peak_flops=1e9)

    run(make_model(), steps, costs=costs, hooks=Hooks(log=every.append))
    run(make_model(), steps, costs=costs, hooks=Hooks(log=sparse.append, log_every=3))

    assert [r["step"] for r in sparse] == [3, 5]
    counts = [count_targets(step) for step in steps]
    for record, (start, stop) in zip(sparse, [(0, 3), (3, 5)], strict=True):
        total = sum(every[i]["loss"] * counts[i] for i in range(start, stop))
        assert record["loss"] == pytest.approx(total / sum(counts[start:stop]), rel=1e-6)
        assert record["tokens"] == stop * 48
        assert record["flops"] == stop * 480.0
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 8.0 / 1e9)
    assert sparse[-1]["grad_norm"] == every[-1]["grad_norm"]
    assert sparse[-1]["seconds"] > sparse[0]["seconds"] > 0.0


def test_hooks_are_called_at_their_steps_and_at_the_end(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    calls: list[str] = []
    state = TrainingState()

    def evaluate() -> float:
        calls.append(f"evaluate {state.step}")
        return 1.5

    hooks = Hooks(
        log=lambda record: calls.append(
            f"{'validation' if 'validation_loss' in record else 'log'} {record['step']}"
        ),
        log_every=4,
        evaluate=evaluate,
        evaluate_every=2,
        save=lambda s: calls.append(f"save {s.step}"),
        save_every=2,
    )

    run(make_model(), make_batches(5), state=state, hooks=hooks)

    assert calls == [
        *("evaluate 2", "validation 2", "save 2"),
        *("log 4", "evaluate 4", "validation 4", "save 4"),
        *("log 5", "evaluate 5", "validation 5", "save 5"),
    ]
    assert state.validation_loss == 1.5


def test_evaluation_and_saving_take_no_training_time(
    make_model: MakeModel, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("samara.train.loop.time.perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    def objective(model: PreTrainedModel, batch: Batch) -> Sums:
        pass_time(2.0)
        return CausalLM()(model, batch)

    def evaluate() -> float:
        pass_time(100.0)
        return 0.0

    records: list[dict[str, Any]] = []
    hooks = Hooks(
        log=records.append,
        evaluate=evaluate,
        evaluate_every=1,
        save=lambda _: pass_time(1000.0),
        save_every=1,
    )

    state = run(make_model(), make_batches(3), objective=objective, hooks=hooks)

    assert state.seconds == 6.0
    assert [r["tokens_per_second"] for r in records if "loss" in r] == [24.0, 24.0, 24.0]


def test_training_mode_comes_back_after_evaluation(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    model = make_model()
    modes: list[bool] = []

    def objective(m: PreTrainedModel, batch: Batch) -> Sums:
        modes.append(m.training)
        return CausalLM()(m, batch)

    def evaluate() -> float:
        model.eval()
        return 0.0

    run(
        model,
        make_batches(2),
        objective=objective,
        hooks=Hooks(evaluate=evaluate, evaluate_every=1),
    )

    assert modes == [True, True]


@pytest.mark.parametrize(
    ("poison", "message"), [(math.nan, "loss is nan"), (1e30, "is inf|is nan")]
)
def test_non_finite_loss_stops_before_the_weights(
    make_model: MakeModel, make_batches: MakeBatches, poison: float, message: str
) -> None:
    model = make_model()
    steps = make_batches(3)
    records: list[dict[str, Any]] = []
    optimizer = Optimizer(model, AdamW(lr=0.01))
    run(model, steps[:2], optimizer=optimizer)
    before = weights(model)
    moments = {k: v.clone() for k, v in optimizer.state_dict().items()}

    def objective(m: PreTrainedModel, batch: Batch) -> Sums:
        sums = CausalLM()(m, batch)
        return Sums(loss=sums.loss * poison * poison, nll=sums.nll * poison * poison)

    hooks = Hooks(log=records.append, last_saved=lambda: Path("runs/x/checkpoints/step-00000002"))
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        run(
            model,
            steps[2:],
            state=TrainingState(step=2),
            optimizer=optimizer,
            objective=objective,
            hooks=hooks,
            clip_grad_norm=1.0,
        )

    text = str(caught.value)
    assert "step 3" in text
    assert "learning rate 0.02" in text
    assert "runs/x/checkpoints/step-00000002" in text
    assert "lower optimizer.lr" in text
    assert "\n" not in text
    assert same(weights(model), before)
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert records[-1]["step"] == 3
    assert not math.isfinite(records[-1]["loss"])


def test_non_finite_gradient_stops_too(make_model: MakeModel, make_batches: MakeBatches) -> None:
    model = make_model()

    model.model.norm.weight.register_hook(lambda grad: grad * math.inf)

    with pytest.raises(
        NonFiniteLossError, match=r"step 1: the gradient norm is (inf|nan)"
    ) as caught:
        run(model, make_batches(1))
    assert "no checkpoint was saved yet" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(
    make_model: MakeModel, make_batches: MakeBatches, number: signal.Signals
) -> None:
    saved: list[int] = []
    previous = signal.getsignal(number)
    hooks = Hooks(
        on_step=lambda state, lr, update: signal.raise_signal(number) if state.step == 2 else None,
        save=lambda state: saved.append(state.step),
    )

    with (
        StopSignal() as stop,
        pytest.raises(Stopped, match=f"stopped by {number.name} after step 2") as caught,
    ):
        run(make_model(), make_batches(5), hooks=hooks, stop=stop)

    assert saved == [2]
    assert caught.value.signal_number == number
    assert "run the same command to go on" in str(caught.value)
    assert signal.getsignal(number) is previous


def test_a_signal_in_the_last_step_lets_the_run_finish(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    saved: list[int] = []
    hooks = Hooks(
        on_step=lambda state, lr, update: (
            signal.raise_signal(signal.SIGINT) if state.step == 2 else None
        ),
        save=lambda state: saved.append(state.step),
    )

    with StopSignal() as stop:
        run(make_model(), make_batches(2), hooks=hooks, stop=stop)

    assert saved == [2]


def test_the_second_signal_ends_at_once(make_model: MakeModel, make_batches: MakeBatches) -> None:
    saved: list[int] = []

    def objective(model: PreTrainedModel, batch: Batch) -> Sums:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return CausalLM()(model, batch)

    # A shell's background job ignores Ctrl-C, and Python then leaves it so.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
            run(
                make_model(),
                make_batches(1),
                objective=objective,
                hooks=Hooks(save=lambda state: saved.append(state.step)),
                stop=stop,
            )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)

    assert saved == []


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    previous = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [previous]


def test_state_survives_json(make_model: MakeModel, make_batches: MakeBatches) -> None:
    state = run(make_model(), make_batches(2), hooks=Hooks(log_every=None))
    state.window.nll_sum = 1 / 3

    again = TrainingState.from_dict(json.loads(json.dumps(dataclasses.asdict(state))))

    assert again == state
