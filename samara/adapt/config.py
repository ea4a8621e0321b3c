"""Settings of fine-tuning on a task: method, data, loop. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError
from samara.measure.tasks_config import (
    ClassificationConfig,
    MultipleChoiceConfig,
    PerplexityConfig,
    QuestionConfig,
    SummarizationConfig,
    TaskConfig,
)
from samara.sparse.config import SparseConfig
from samara.train.config import AdamW, Cosine, LoggingConfig, Schedule, check_exportable
from samara.train.layer_rates import LayerDropoutConfig

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class LabelsConfig(TaskConfig):
    """Classification by a head of its own on the trunk, for encoders and decoders.

    Scores: `accuracy`, macro precision, recall and F1. (`classification` chooses among words.)
    """

    kind: Literal["labels"] = "labels"
    text: str = "{text}"
    """What the model reads; `{field}` is filled from the row."""
    label: str = "label"
    """The field with the label."""
    labels: tuple[str, ...] | None = None
    """All labels, in the order of the head's outputs. Left out: those of the data, sorted."""
    max_labels: Annotated[int, Field(ge=2)] | None = None
    """Keep this many labels: the most frequent of the training rows. Left out: all."""
    other_labels: Literal["refuse", "leave_out"] = "refuse"
    """Rows with none of these labels, such as one that training never saw: `refuse` is an error,
    `leave_out` neither trains on them nor scores them, and records how many they were."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_labels is not None and self.labels is not None:
            raise ConfigError("max_labels: chooses among labels, and labels names them; give one")
        if self.max_labels is not None and self.other_labels == "refuse":
            raise ConfigError("max_labels: leaves rows out; say so with other_labels: leave_out")
        return self


TaskSettings = Annotated[
    LabelsConfig
    | ClassificationConfig
    | MultipleChoiceConfig
    | QuestionConfig
    | SummarizationConfig
    | PerplexityConfig,
    Field(discriminator="kind"),
]


class FinetuneData(Config):
    """What is trained on, and held out. (The rows that are scored at the end: `task.data`.)"""

    train: str
    """Rows to train on: .jsonl, .csv or .tsv, each also with .gz; fields as the task reads them."""
    max_rows: PositiveInt | None = None
    """Use this many of the training rows, those held out of them included; hashes choose them,
    whatever their order. Left out: all."""
    validation: str | None = None
    """Rows for the validation loss. Left out: a fraction of the training rows."""
    validation_fraction: Fraction = 0.1
    """Share of the training rows held out where there is no `validation`; hashes decide."""
    sequence_length: PositiveInt = 256
    """Most tokens of a row. A longer one loses the beginning of its prompt, or its end."""
    num_workers: NonNegativeInt = 0
    """Processes that read ahead; the order does not depend on it."""


class SparseMethod(SparseConfig):
    """Few weights of the model, chosen and trained in place; the result is a delta file."""

    kind: Literal["sparse"] = "sparse"


class FullMethod(Config):
    """All weights, in float32; the result is a model folder."""

    kind: Literal["full"] = "full"
    optimizer: AdamW = AdamW(lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)


class LoraMethod(Config):
    """Low-rank adapters (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353), by `peft`."""

    kind: Literal["lora", "dora"]
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    """Scale of the update, times 1 / rank. Left out: twice the rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    targets: tuple[str, ...] | None = None
    """Names of the layers. Left out: all linear layers of the trunk."""
    optimizer: AdamW = AdamW(lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0)


class ShiraMethod(Config):
    """A random sparse mask over dense adapters (SHiRA, arXiv 2406.13175), by `peft`."""

    kind: Literal["shira"] = "shira"
    rank: PositiveInt = 16
    """As many entries as LoRA's parameters of this rank."""
    targets: tuple[str, ...] | None = None
    """Names of the layers. Left out: all linear layers of the trunk."""
    optimizer: AdamW = AdamW(lr=3e-4, betas=(0.9, 0.999), weight_decay=0.0)


Method = Annotated[
    SparseMethod | FullMethod | LoraMethod | ShiraMethod, Field(discriminator="kind")
]


class FinetuneTraining(Config):
    """The loop: how much, in which batches, at which precision."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Give this or epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows; rounded up to whole steps."""
    batch_size: PositiveInt = 16
    """Rows of an optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Rows of a forward pass; the rest is accumulated. Left out: all at once."""
    clip_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """`bfloat16`: autocast. `float32`: as the weights are stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    """`torch.compile` the trunk."""
    activation_checkpointing: Literal["none", "layer"] = "none"
    """`layer`: keep each layer's input, recompute the rest."""
    layer_dropout: LayerDropoutConfig | None = None
    """Leave out some layers in each pass of training, whatever the method; choosing weights and
    every evaluation use all of them. Left out: none."""
    evaluate_every_steps: PositiveInt | None = None
    """Validation loss every N steps. Left out: only at the end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError("give one of max_steps and epochs")
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ConfigError(
                f"batch_size {self.batch_size} is not divisible by micro_batch_size {micro}"
            )
        check_exportable(self.layer_dropout)
        return self

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return max(1, -int(-self.epochs * num_rows // self.batch_size))


class FinetuneCheckpoints(Config):
    """When the state is saved, and how much of it is kept."""

    every_steps: PositiveInt | None = None
    """Save every N steps. Left out: at a stop signal and at the end."""
    keep_last: PositiveInt = 1
    """Complete checkpoints kept for resuming."""


class FinetuneConfig(Config):
    """Verb `finetune`: a model and a task in, a delta, an adapter or a model out.

    Every method runs in the same loop, on the same data in the same order, under the same schedule
    and evaluation. Resumes by itself if its run folder exists.
    """

    seed: NonNegativeInt = 0
    init_from: str
    """The model to adapt: any Hugging Face model folder, a run folder, or `stage:NAME`."""
    task: TaskSettings
    """What is learnt and scored, as a task file says it; `data` holds the rows scored at the end.
    """
    data: FinetuneData
    method: Method = SparseMethod()
    schedule: Schedule = Cosine()
    training: FinetuneTraining
    checkpoint: FinetuneCheckpoints = FinetuneCheckpoints()
    logging: LoggingConfig = LoggingConfig()
    folds: Annotated[int, Field(ge=2)] | None = None
    """k-fold cross-validation, for small data: first k runs, each trained on all but a k-th of the
    training rows and scored on that. Left out: none."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Of the intervals of the scores."""
    evaluation_batch_size: PositiveInt = 16
    """Rows at a time when the task is scored."""
    score_base: bool = False
    """Score the model before training, too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        method = self.method
        watches = isinstance(method, SparseMethod) and method.expansion is not None
        if watches and self.training.evaluate_every_steps is None:
            raise ConfigError(
                "method.expansion: needs training.evaluate_every_steps to see a stall"
            )
        return self
