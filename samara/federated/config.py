"""Settings of federated fine-tuning: clients, layer dropout, sharing, devices. No torch here."""

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

from samara.adapt.config import LabelsConfig
from samara.config import Config
from samara.errors import ConfigError
from samara.federated.methods_config import (
    DepthSearch,
    FedAvg,
    FederatedRows,
    MixedRanks,
    ServerUpdate,
)
from samara.federated.privacy_config import PrivacyConfig, check_privacy
from samara.measure.tasks_config import PerplexityConfig
from samara.sparse.config import SelectionConfig
from samara.train.config import AdamW
from samara.train.layer_rates import LayerDropoutConfig, Shape

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


# --- the configurator -----------------------------------------------------------------------------


class EpsilonGreedy(Config):
    """Explore with a probability that falls over the rounds; otherwise the best mean."""

    kind: Literal["epsilon_greedy"] = "epsilon_greedy"
    epsilon: Fraction = 0.3
    """Probability of exploring at first, and when a class of devices has changed."""
    decay: Share = 0.97
    """Its factor per round."""
    floor: Fraction = 0.05
    """It falls no lower."""


class UCBTuned(Config):
    """UCB1-tuned (Auer et al. 2002) over discounted observations."""

    kind: Literal["ucb_tuned"] = "ucb_tuned"


class SlidingWindow(Config):
    """UCB1-tuned over the last observations of the class alone."""

    kind: Literal["sliding_window"] = "sliding_window"
    window: PositiveInt = 100
    """Observations kept."""


class Thompson(Config):
    """Sample a mean of each arm from a normal posterior, and take the largest."""

    kind: Literal["thompson"] = "thompson"
    prior_count: PositiveFloat = 1.0
    """How many observations the prior counts for: narrows the posterior of a young arm."""


Policy = Annotated[EpsilonGreedy | UCBTuned | SlidingWindow | Thompson, Field(discriminator="kind")]


class ConfiguratorConfig(Config):
    """Chooses rate and shape of layer dropout per device, by trying."""

    rates: tuple[Rate, ...] = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8)
    """Mean drop rates. 0, nothing dropped, is always an arm."""
    shapes: tuple[Shape, ...] = ("incremental", "uniform")
    """How a rate is spread over the depth; each with each rate."""
    policy: Policy = EpsilonGreedy()
    per: Literal["second", "joule"] = "second"
    """What the gain of a local training is divided by."""
    rewards: Literal["clients", "server"] = "clients"
    """What a gain is measured on. `clients`: each client's own validation rows. `server`: the
    server's, once a round for all; every device class tries one arm a round, whoever of it takes
    part, and the clients tell nothing."""
    discount: Share = 0.98
    """Weight that an observation loses per round."""
    explore_share: Share = 0.5
    """Largest share of a class's clients in one round whose arm is not the best known."""
    memory_margin: NonNegativeFloat = 0.1
    """An arm is offered if its modelled peak times 1 + margin fits the device."""
    pace: PositiveFloat | None = None
    """A round lasts as long as its slowest client. A device is offered arms whose computation takes
    at most so many times that of the fastest kind of device with nothing dropped; if none does, the
    one that takes least. 1: all kinds keep up with the fastest. Left out: no limit."""
    quarantine_rounds: PositiveInt = 20
    """How long an arm that failed is not offered to its class."""
    accuracy_drop: Share = 0.05
    """A fall of a client's validation accuracy that counts against the arm; two in a row do."""
    offset_strength: PositiveFloat = 5.0
    """Observations after which half of a device's own deviation from its class is believed."""
    change_threshold: PositiveFloat = 0.5
    """Cumulated change of log slowness that counts as a changed device (0.69 is twice as slow)."""
    change_drift: NonNegativeFloat = 0.05
    """Change of log slowness per observation that is noise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("rates", "shapes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: give one or more different values, got {list(values)}")
        return self


# --- sharing layers -------------------------------------------------------------------------------


class SharingConfig(Config):
    """Which layers a client gives to all, and which it keeps for itself."""

    direction: Literal["all", "share_common", "share_important", "depth", "none"] = "all"
    """`all`: every layer is shared. `share_common`: a client keeps the layers that matter more to
    it than to the others. `share_important`: it shares those. `depth`: it shares the lower layers.
    `none`: nothing but the head."""
    shared_layers: PositiveInt | None = None
    """Layers that a client shares. Left out: half of them."""
    max_personal_layers: NonNegativeInt | None = None
    """Policy: most layers that a client may keep. Left out: all but one."""
    importance: Literal["grad_norm", "fisher", "weight_change", "taylor"] = "grad_norm"
    """Accumulated over the batches in which the layer was active, per such batch."""
    memory: Share = 0.5
    """Weight of the newest participation in a client's running importance."""
    hysteresis: NonNegativeFloat = 0.1
    """Relative margin by which a layer must be on the other side of the cut …"""
    patience: PositiveInt = 2
    """… in so many participations of the client in a row, before it changes side."""
    share_every_rounds: PositiveInt = 10
    """Policy: a layer that nobody shared for so many rounds is asked of the clients chosen next."""
    head: Literal["shared", "personal"] = "shared"
    """What is in no layer, as the classifier; `personal` for clients with labels of their own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.direction == "none" and self.max_personal_layers is not None:
            raise ConfigError(
                "max_personal_layers: direction none keeps every layer personal; leave it out, or "
                "choose another direction"
            )
        return self


# --- whose data -----------------------------------------------------------------------------------


class IIDPartition(Config):
    """Every client the same: equal numbers of rows, drawn at random."""

    kind: Literal["iid"] = "iid"


class DirichletPartition(Config):
    """Clients with labels of their own: each label is spread by a draw from Dirichlet(alpha)."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: PositiveFloat = 1.0
    """0.1: most clients see one or two labels; 10: nearly all see the same."""
    min_rows: PositiveInt = 10
    """A client that is left with fewer takes rows from the largest."""


class KeyPartition(Config):
    """Natural clients: all rows with the same value of a field are one client's."""

    kind: Literal["key"] = "key"
    field: str
    """The field, as `user`."""
    min_rows: PositiveInt = 3
    """Users with fewer rows are small."""
    small: Literal["leave_out", "merge"] = "leave_out"
    """What becomes of small users, and of those beyond `clients.number` of the largest: their rows
    are left out, or the smallest are put together until they are enough and no more than that."""


class QuantityPartition(Config):
    """Clients of unlike sizes: the rows are spread by a draw from Dirichlet(alpha)."""

    kind: Literal["quantity"] = "quantity"
    alpha: PositiveFloat = 1.0
    min_rows: PositiveInt = 10
    """A client that is left with fewer takes rows from the largest."""


Partition = Annotated[
    IIDPartition | DirichletPartition | KeyPartition | QuantityPartition,
    Field(discriminator="kind"),
]


# --- devices and their clock ----------------------------------------------------------------------


class SlownessChange(Config):
    """From a round on, the device is slower or faster than before."""

    round: NonNegativeInt
    factor: PositiveFloat
    """2: takes twice the time."""


class FederatedDevice(Config):
    """A kind of device that clients run on; clients of one kind are one class of the configurator.

    What follows from it is modelled, not measured.
    """

    name: str
    slowness: PositiveFloat
    """Compute time over that of the reference: the Jetson TX2, or the machine calibrated on."""
    memory_bytes: PositiveFloat
    """What training may use."""
    download_bytes_per_second: PositiveFloat
    upload_bytes_per_second: PositiveFloat
    compute_watts: NonNegativeFloat
    communicate_watts: NonNegativeFloat
    availability: Fraction = 1.0
    """Probability that a client can be reached in a round."""
    failure_probability: Fraction = 0.0
    """Probability that a client which was asked sends no reply."""
    slowness_changes: tuple[SlownessChange, ...] = ()
    source: str
    """Where the figures come from, and which are assumed."""


class DeviceShare(Config):
    """Part of the clients run on this device."""

    profile: str
    """A built-in device (jetson-tx2, jetson-nano, raspberry-pi-4b) or the path of a .yaml file."""
    share: PositiveFloat = 1.0
    """Relative to the other entries."""


class CalibratedClock(Config):
    """Measure on this machine what a batch costs, fixed and per active layer."""

    kind: Literal["calibrated"] = "calibrated"
    repetitions: PositiveInt = 5
    """Of each depth; the median counts."""


class GivenClock(Config):
    """Costs of a batch from elsewhere: measured on the device itself, or published."""

    kind: Literal["given"] = "given"
    seconds_fixed: NonNegativeFloat
    """Embedding, head, optimizer: whatever is active."""
    seconds_per_layer: NonNegativeFloat
    bytes_fixed: NonNegativeFloat
    bytes_per_layer: NonNegativeFloat
    source: str


Clock = Annotated[CalibratedClock | GivenClock, Field(discriminator="kind")]


# --- the whole ------------------------------------------------------------------------------------

FederatedTask = Annotated[LabelsConfig | PerplexityConfig, Field(discriminator="kind")]

Method = Literal[
    "droppeft", "static_stld", "fedavg", "fedlora", "fedlora_checkpointing", "frozen_depth",
    "head_only", "fedadapter", "hetlora",
]  # fmt: skip
PAYLOAD_METHODS = ("droppeft", "static_stld", "fedavg")
"""Methods that know other payloads than adapters."""


class ClientsConfig(Config):
    """Who takes part, with which data and on which devices."""

    number: PositiveInt | None = None
    """Clients there are. With partition `key` it may be left out: one per value."""
    per_round: PositiveInt = 10
    """Clients that are asked in a round, drawn from those available."""
    partition: Partition = DirichletPartition()
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Of a client's rows: the gain of its training is measured on them."""
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Of a client's rows: scored at the end."""
    personal_from: str | None = None
    """A folder that `samara personal export` wrote: the clients in it begin with the layers that
    they kept in another run. Of `superlink`: each node names its own."""
    devices: tuple[DeviceShare, ...] = (
        DeviceShare(profile="jetson-tx2"),
        DeviceShare(profile="jetson-nano"),
        DeviceShare(profile="raspberry-pi-4b"),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.devices:
            raise ConfigError("devices: is empty; name at least one")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction: {self.validation_fraction:g} and test_fraction "
                f"{self.test_fraction:g} leave nothing to train on; lower them"
            )
        return self


class FederatedLora(Config):
    """The adapters that are trained, by `peft`; nothing else leaves a client, and the head."""

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    """Scale of the update, times 1 / rank. Left out: twice the rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: tuple[str, ...] | None = None
    """Names of the linear layers. Left out: all of the trunk."""


class LocalTraining(Config):
    """What a client does when it is asked. Its optimizer starts afresh each time."""

    steps: PositiveInt = 10
    """Optimizer steps."""
    batch_size: PositiveInt = 8
    optimizer: AdamW = AdamW(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    clip_grad_norm: PositiveFloat | None = 1.0
    proximal: NonNegativeFloat = 0.0
    """FedProx: weight of half the squared distance from where the training began, beside the loss.
    0: none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: autocast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of this machine, which plays all clients one after another."""


class ServerConfig(Config):
    """What the server does around the clients."""

    rounds: PositiveInt
    optimizer: ServerUpdate = FedAvg()
    """What becomes of the mean of a round: `fedavg` takes it; `fedadam`, `fedyogi`, `fedadagrad`
    step along it. (FedProx is the clients': `local.proximal`.)"""
    max_change: Annotated[float, Field(gt=1.0)] | None = 10.0
    """A reply that moved more than so many times the median reply is refused. Null: none is."""
    rollback_rise: NonNegativeFloat | None = 0.2
    """A rise of the validation loss above the best, relative to it, after which the server goes
    back to the best round's weights. Left out (null): only if the loss is not finite."""
    deadline_seconds: PositiveFloat | None = None
    """On the virtual clock. A later reply is not used."""
    evaluation_batch_size: PositiveInt = 32


class FederateConfig(Config):
    """Verb `federate`: a model and the data of many clients in, one adapter out (and the clients'
    own layers). Resumes by itself if its run folder exists.

    One line switches the method; all of them run in the same harness.
    """

    seed: NonNegativeInt = 0
    init_from: str
    """The model to adapt: any Hugging Face model folder, a run folder, or `stage:NAME`."""
    task: FederatedTask
    """`labels`: classification; `perplexity`: language modelling. `data` holds the test rows."""
    data: FederatedRows
    """`train` is dealt out to the clients; the validation rows stay with the server."""
    method: Method = "droppeft"
    """`droppeft`: layer dropout by the configurator, and layers shared by `sharing`.
    Baselines: `static_stld` (layer dropout by `layer_dropout`, everything shared), `fedlora` (no
    dropout), `fedavg` (the same, of any payload), `fedlora_checkpointing` (with activation
    checkpointing), `frozen_depth` (adapters in the upper layers only, by `trained_layers`),
    `head_only` (no adapters), `fedadapter` (depth and width grow by trials: `depth_search`),
    `hetlora` (a rank for each kind of device: `mixed_ranks`)."""
    payload: Literal["lora", "sparse", "full"] = "lora"
    """What is trained and exchanged: adapters; few weights by `selection`, chosen by the server on
    its validation rows; or all weights. The other two are for `droppeft`, `static_stld`, `fedavg`.
    """
    lora: FederatedLora = FederatedLora()
    selection: SelectionConfig = SelectionConfig()
    """Of payload `sparse`."""
    layer_dropout: LayerDropoutConfig = LayerDropoutConfig(rate=0.5)
    """Under `droppeft` the configurator sets its rate and shape."""
    trained_layers: PositiveInt | None = None
    """Of `frozen_depth`: upper layers that are trained. Left out: half of them."""
    depth_search: DepthSearch = DepthSearch()
    """Of `fedadapter`."""
    mixed_ranks: MixedRanks = MixedRanks()
    """Of `hetlora`."""
    configurator: ConfiguratorConfig = ConfiguratorConfig()
    sharing: SharingConfig = SharingConfig()
    clients: ClientsConfig
    local: LocalTraining = LocalTraining()
    server: ServerConfig
    privacy: PrivacyConfig = PrivacyConfig()
    clock: Clock = CalibratedClock()
    engine: Literal["in_process", "flower", "superlink"] = "in_process"
    """Who carries the messages, with the same result. `in_process`: this process plays server and
    clients. `flower`: the simulation of Flower plays the clients in processes of their own.
    `superlink`: devices of their own that run Flower's SuperNode; `--deploy` writes such a recipe
    with its app. `data.train` is then what each node names as its own rows."""
    actors: PositiveInt = 2
    """Of `flower`: clients that train at the same time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method == "head_only" and not isinstance(self.task, LabelsConfig):
            raise ConfigError("method: head_only needs task.kind labels; there is no other head")
        if self.payload != "lora" and self.method not in PAYLOAD_METHODS:
            raise ConfigError(
                f"payload: {self.payload} is exchanged under {', '.join(PAYLOAD_METHODS)}, and "
                f"method is {self.method}; use one of those, or payload lora"
            )
        if self.method in ("fedadapter", "hetlora") and self.server.optimizer.kind != "fedavg":
            raise ConfigError(
                f"server.optimizer: {self.server.optimizer.kind} steps whole layers, and under "
                f"{self.method} clients send parts of them; use fedavg"
            )
        if self.layer_dropout.scale == "survival_at_eval":
            raise ConfigError(
                "layer_dropout.scale: survival_at_eval changes evaluation, which here runs the "
                "model as it is; use none or inverse_keep"
            )
        if not isinstance(self.task, LabelsConfig) and isinstance(
            self.clients.partition, DirichletPartition
        ):
            raise ConfigError(
                "clients.partition: dirichlet spreads labels, and the task has none; use iid, key "
                "or quantity"
            )
        if self.engine == "superlink":
            self._check_deployed()
        check_privacy(
            self.privacy,
            engine=self.engine,
            method=self.method,
            direction=self.sharing.direction,
            rewards=self.configurator.rewards,
            max_change=self.server.max_change,
            clip_grad_norm=self.local.clip_grad_norm,
            precision=self.local.precision,
            proximal=self.local.proximal,
            payload=self.payload,
            per_round=self.clients.per_round,
        )
        return self

    def _check_deployed(self) -> None:
        """What follows from the training rows on one machine has to be said on many."""
        if isinstance(self.task, LabelsConfig) and self.task.labels is None:
            raise ConfigError("task.labels: engine superlink cannot see the rows; name all labels")
        if self.data.validation is None:
            raise ConfigError(
                "data.validation: engine superlink cannot hold out rows of the clients; name a "
                "file of the server's own"
            )
        if self.payload == "sparse":
            raise ConfigError(
                "payload: sparse needs the server's choice of weights on each node, and engine "
                "superlink hands no files out; use lora or full"
            )
        if self.data.max_rows is not None:
            raise ConfigError(
                "data.max_rows: engine superlink trains on all rows of a node; leave it out"
            )
        if self.clients.number is None:
            raise ConfigError("clients.number: engine superlink cannot count the clients; give it")
        if self.clients.personal_from is not None:
            raise ConfigError(
                "clients.personal_from: is on the nodes under engine superlink; leave it out, and "
                "give personal=FOLDER in the node's --node-config"
            )
