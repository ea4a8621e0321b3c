"""What a delta file says about itself: identity, base, origin, evaluation, audit, licence.

These are the fields of the JSON record in the file's header. Everything that bears on the weights
(indices, values, hashes) is checked against the data when a file is read; the rest is the maker's
word, kept unchanged by a hash over the whole record. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from samara.config import Config
from samara.registry.records import Audit, Evaluation, License

Mode = Literal["ulp", "xor", "overwrite", "additive"]
Dtype = Literal["BF16", "F16", "F32"]
IndexCodec = Literal["gap_u16z", "rice", "block", "cols", "rows", "range"]
ValueCodec = Literal["ulp_steps", "xor_bits", "abs_bits", "f32"]
Compression = Literal["zstd", "stored"]
Policy = Literal["error", "last", "priority", "sum"]


class Producer(Config):
    """The program that wrote the file."""

    name: str = "samara"
    version: str


class Base(Config):
    """The model that the delta was made for."""

    model_id: str | None = None
    """Name on a hub, or of a folder; never used to decide whether weights fit."""
    revision_commit: str | None = None
    """Commit of ``model_id``; the delta's own revision is none of its business."""
    config_sha256: str | None = None
    """SHA-256 of the base's ``config.json``."""
    tensors_root: str
    """SHA-256 over name, type, shape and SHA-256 of every tensor of the bare base."""


class Selector(Config):
    """How the changed weights were chosen."""

    score: str
    exponents: tuple[float, float, float] | None = None
    normalize: str | None = None
    rho: float | None = None
    granularity: str | None = None
    density: float | None = None
    k_total: int | None = None
    """Entries selected; those whose bits did not change are not in the file."""
    n_samples: int | None = None
    calib_sha256: str | None = None
    seed: int | None = None
    auto_table: list[dict[str, Any]] | None = None
    """Every candidate that ``auto`` tried, with its held-out loss."""


class Cost(Config):
    """Device-hours, by what they were spent on."""

    selection_hours: float | None = None
    training_hours: float | None = None
    evaluation_hours: float | None = None


class Train(Config):
    """How the values were trained."""

    data_sha256: str | None = None
    recipe: dict[str, Any] | None = None
    seed: int | None = None
    deterministic: bool | None = None
    code_commit: str | None = None
    environment: dict[str, Any] | None = None
    cost: Cost | None = None


class Member(Config):
    """A delta that went into a composed one."""

    delta_id: str
    priority: int | None = None


class Composition(Config):
    """How a composed delta came about."""

    policy: Policy
    members: list[Member]


class TensorRecord(Config):
    """One tensor's share of the delta."""

    name: str
    """Name in the checkpoint; a tied tensor stands under the name it is stored by."""
    shape: tuple[int, ...]
    dtype: Dtype
    nnz: int = Field(ge=0)
    idx_codec: IndexCodec
    idx_params: dict[str, Any] = Field(default_factory=dict)
    val_codec: ValueCodec
    comp: Compression
    sel_pre_xxh128: str | None = None
    """Hash of the touched entries' bits before; None in ``additive`` mode, whose base may vary."""
    sel_post_xxh128: str | None = None
    tensor_pre_sha256: str | None = None
    tensor_post_sha256: str | None = None


class Provenance(Config):
    """What a maker hands over for a delta's record; everything may be left out."""

    model_id: str | None = None
    revision_commit: str | None = None
    config_sha256: str | None = None
    created: str | None = None
    """UTC time, ISO 8601; None: now."""
    selector: Selector | None = None
    train: Train | None = None
    eval: list[Evaluation] = Field(default_factory=list)
    audit: list[Audit] = Field(default_factory=list)
    license: License = License()
    composition: Composition | None = None


class Record(Config):
    """The whole record of a delta file."""

    format_version: Literal[1] = 1
    delta_id: str
    created: str
    producer: Producer
    parent: str | None = None
    """``delta_id`` that must be applied first; None: the delta belongs on the bare base."""
    base: Base
    mode: Mode
    selector: Selector | None = None
    train: Train | None = None
    eval: list[Evaluation] = Field(default_factory=list)
    audit: list[Audit] = Field(default_factory=list)
    license: License = License()
    composition: Composition | None = None
    tensors: list[TensorRecord]
    payload_sha256: str
    """SHA-256 of the file's data section."""
