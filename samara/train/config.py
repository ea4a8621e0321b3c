"""Settings of training: optimizer, schedule, loop, checkpoints, logs. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from samara.config import Config
from samara.data.config import ChatConfig, DataConfig
from samara.data.objectives import CausalObjective, Objective
from samara.errors import ConfigError
from samara.model.config import ModelConfig
from samara.train.layer_rates import LayerDropoutConfig, LayerRates

UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]


class AdamW(Config):
    """AdamW (arXiv 1711.05101), `torch.optim.AdamW`."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """`matrices`: no decay on vectors (norms, biases); embeddings are decayed (OpenELM).
    `all`: everything (CoLA)."""


class Muon(Config):
    """Muon (momentum orthogonalised by Newton-Schulz) on hidden matrices, AdamW on the rest.

    `torch.optim.Muon`; each low-rank factor is one matrix. Embedding, head and norms take AdamW.
    """

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat
    """Peak learning rate of the hidden matrices."""
    momentum: UnitInterval = 0.95
    nesterov: bool = True
    ns_steps: PositiveInt = 5
    weight_decay: NonNegativeFloat = 0.1
    adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """How lr scales with a matrix's shape; `match_rms_adamw` takes learning rates of AdamW's size
    (Moonlight, arXiv 2502.16982)."""
    adamw_lr: PositiveFloat | None = None
    """Peak learning rate of embedding, head and norms. Left out: lr."""
    adamw_betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]


class Cosine(Config):
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: NonNegativeInt | None = None
    """Left out: 2 % of the steps."""
    initial_lr: NonNegativeFloat = 0.0
    """Learning rate at step 0, before warm-up (OpenELM: 1e-6)."""
    final_fraction: UnitInterval = 0.1


class WarmupStableDecay(Config):
    """Linear warm-up, a constant rate, then a short decay (arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: NonNegativeInt | None = None
    """Left out: 2 % of the steps."""
    initial_lr: NonNegativeFloat = 0.0
    decay_fraction: UnitInterval = 0.2
    """Share of the steps at the end over which the rate falls."""
    final_fraction: UnitInterval = 0.0
    shape: Literal["linear", "sqrt"] = "linear"


Schedule = Annotated[Cosine | WarmupStableDecay, Field(discriminator="kind")]


class TrainingConfig(Config):
    """The loop: how much, in which batches, at which precision."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Give this or max_tokens."""
    max_tokens: PositiveInt | None = None
    """Token budget (sequence positions, padding counted); rounded up to whole steps."""
    batch_size: PositiveInt
    """Sequences per optimizer step, over all devices."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward pass on one device; the rest is accumulated. Left out: all at once."""
    clip_grad_norm: PositiveFloat | None = 1.0
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log-partition (OpenELM: 1e-4)."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """`bfloat16`: autocast over float32 weights. `float32`: everything."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["none", "ddp", "fsdp"] | None = None
    """How processes that `torchrun` starts share the model. `ddp`: each has all of it. `fsdp`: each
    has its share of weights, gradients and optimizer state. Left out: ddp if there are several."""
    compile: bool = False
    """`torch.compile` the model."""
    activation_checkpointing: Literal["none", "layer", "cola_m"] = "none"
    """`layer`: keep each layer's input, recompute the rest. `cola_m`: keep the low-rank
    pre-activations too and recompute no A·x (CoLA-M; needs a CoLA model)."""
    layer_dropout: LayerDropoutConfig | None = None
    """Leave out some layers in each pass of training. Left out: none."""
    evaluate_every_steps: PositiveInt | None = None
    """Validation loss every N steps. Left out: only at the end."""
    evaluate_max_tokens: PositiveInt | None = None
    """Validation tokens used during training (the first ones). Left out: all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ConfigError("give one of max_steps and max_tokens")
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ConfigError(
                f"batch_size {self.batch_size} is not divisible by micro_batch_size {micro}"
            )
        check_exportable(self.layer_dropout)
        if self.parallel in ("ddp", "fsdp") and self.layer_dropout is not None:
            raise ConfigError(
                f"parallel: {self.parallel} goes without layer_dropout, under which processes wait "
                "for gradients of layers that did not run; leave one of them out"
            )
        return self

    def layer_rates(self, num_layers: int) -> LayerRates | None:
        """How often layer dropout lets each layer of a model run; None: it is off.

        Raises:
            ConfigError: If its settings do not fit so many layers.
        """
        if self.layer_dropout is None:
            return None
        try:
            return self.layer_dropout.rates(num_layers)
        except ConfigError as error:
            raise ConfigError(f"training.{error}") from error

    def num_steps(self, sequence_length: int) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return -(-self.max_tokens // (self.batch_size * sequence_length))


def check_exportable(dropout: LayerDropoutConfig | None) -> None:
    """Refuse layer dropout whose evaluation the model that is written would not know.

    Raises:
        ConfigError: If that is so.
    """
    if dropout is not None and dropout.scale == "survival_at_eval":
        raise ConfigError(
            "layer_dropout.scale: survival_at_eval changes how a model is evaluated, which the "
            "model that is written would not know; use inverse_keep"
        )


class CheckpointConfig(Config):
    """When the state is saved, and what is kept."""

    every_steps: PositiveInt | None = None
    """Save every N steps. Left out: at a stop signal and at the end."""
    keep_last: PositiveInt = 2
    """Complete checkpoints kept for resuming."""
    average_last: PositiveInt = 1
    """The final model is the mean, in float64, of the weights at the last N checkpoint steps
    (OpenELM: 5). 1: the last weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.average_last > 1 and self.every_steps is None:
            raise ConfigError("average_last > 1 needs every_steps")
        return self


class LoggingConfig(Config):
    """`metrics.jsonl` is always written; the rest is a choice."""

    every_steps: PositiveInt = 10
    sinks: tuple[Literal["tensorboard", "trackio"], ...] = ()
    """Also write to these (extra `tracking`)."""
    device_profile: str = "auto"
    """Names the watts and prices behind energy and cost: a built-in profile or a YAML file."""


def check_fits(
    model: ModelConfig | None, *, data: DataConfig, objective: Objective, training: TrainingConfig
) -> None:
    """Check what one section of a training recipe asks of another.

    Raises:
        ConfigError: If they do not fit together.
    """
    if data.rows.kind != "packed" and objective.kind != "causal_lm":
        raise ConfigError(
            f"data.rows: {data.rows.kind} rows go with objective causal_lm, "
            f"not {objective.kind}; use packed"
        )
    if model is None:
        return
    if training.activation_checkpointing == "cola_m" and model.cola is None:
        raise ConfigError(
            "training.activation_checkpointing: cola_m needs model.cola; use layer instead"
        )
    training.layer_rates(model.num_hidden_layers)
    if data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length {data.sequence_length} exceeds "
            f"model.max_position_embeddings {model.max_position_embeddings}"
        )


class PretrainConfig(Config):
    """Verb `pretrain`: corpus in, checkpoint out. Resumes by itself if its run folder exists."""

    seed: NonNegativeInt = 0
    model: ModelConfig | None = None
    """The design. Leave out with init_from."""
    init_from: str | None = None
    """A model folder or `stage:NAME` to go on from (continued pretraining on other text)."""
    data: DataConfig
    objective: Objective = CausalObjective()
    """What the model learns to predict."""
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.init_from is None):
            raise ConfigError("give one of model and init_from")
        check_fits(self.model, data=self.data, objective=self.objective, training=self.training)
        return self

    def resolved(self) -> PretrainConfig:
        """The same settings with the design expanded to one entry per layer."""
        return self.model_copy(update={"model": self.model and self.model.resolved()})


class InstructConfig(Config):
    """Verb `instruct`: a model and conversations in, a model that answers out; resumes by itself.

    The loss is on the answers only. The model keeps its tokenizer, which gets a chat template
    unless it has one.
    """

    seed: NonNegativeInt = 0
    init_from: str
    """The model to tune: a model folder, a run folder, or `stage:NAME`."""
    data: ChatConfig
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
