"""The section `clients`: how many there are, what they run on, and how strong they are."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ByteSize,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fedray.config.engine import EngineConfig, engines_with, parse_tier_engine
from fedray.config.section import Fraction, PositiveInt, Section
from fedray.errors import choices
from fedray.types import Capacity


def _whole_above_one(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError("above 1, GPUs come whole")
    return amount


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
Dtype = Literal["float32", "bfloat16", "float16"]
"""A type of floating-point numbers."""
Quantised = Literal["nf4", "int8"]
"""How bitsandbytes rounds the weights of linear layers."""
Precision = Literal[Dtype, Quantised]


Fuse = Literal["auto", "off"] | Annotated[int, Field(ge=2)]
"""2 or more, `off`, or `auto`."""
HOST_STEP_THREADS = 4
"""Threads of an actor on a GPU whose optimizer's step is computed on the host."""
ROUNDING = 1e-6
"""Shares that differ from 1 by less than this are rounding."""


class TierConfig(Section):
    """One kind of device: what it can hold and how it is reached. What is left out is that of all clients."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the clients that no tier lists; the shares of all tiers add up to 1."""
    clients: tuple[str, ...] = ()
    """Ids of the clients of this tier, instead of a share."""
    num_cpus: Annotated[float, Field(gt=0)] | None = None
    """CPUs of one client actor; may be a fraction. Default: clients.num_cpus."""
    num_gpus: Gpus | None = None
    """GPUs of one client actor; may be a fraction. Default: clients.num_gpus."""
    memory: ByteSize | None = None
    """Host memory of one client actor that Ray reserves, in bytes or as `4GB`."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Further Ray resources of one client actor, by name."""
    actors: PositiveInt | None = None
    """Number of client actors; default as many as the cluster can hold, and no more than the cohort can use."""
    fuse: Fuse | None = None
    """Clients that are trained in one step; default: clients.fuse."""
    workers: PositiveInt = 1
    """Processes that train one client of this tier together, data-parallel on Ray Train, each with what the tier asks
    for: a silo. An optimizer step has `workers` times as many examples. Above 1: engine torch, or one of your own that
    sums gradients over its process group."""
    precision: Precision | None = None
    """Type of the frozen base weights on this tier; default model.dtype. Adapters are always float32, and so are base
    parameters that train: with `bfloat16`, full fine-tuning is in mixed precision. `nf4` and `int8` quantise the base
    model's linear layers with bitsandbytes (the extra `quantised`) to 4 and 8 bits; what is not quantised, and the
    arithmetic, is in model.dtype. Needs an engine that can hold such layers: torch."""
    engine: SerializeAsAny[EngineConfig] = Field(default_factory=EngineConfig)  # filled in by `_engine`
    """What moves the parameters: `torch` (default), `deepspeed`, or `{class: module.Class, ...}` of your own. The
    fields of a built-in engine stand beside it: `offload` and `deepspeed`, for example."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again."""
    lora_rank: PositiveInt | None = None
    """LoRA rank r_k of this tier, at most lora.rank: the first r_k of the common rank's components."""
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """FedHFT's ρ: share of output rows that a client of this tier can hold."""
    reft_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Blocks whose output is edited on this tier; default and superset: reft.layers."""
    batch_size: PositiveInt | None = None
    """Examples per micro-batch; default train.batch_size."""
    accumulation: PositiveInt | None = None
    """Micro-batches per optimizer step; default train.accumulation."""
    speed: Annotated[float, Field(gt=0)] = 1.0
    """Speed of the device relative to the one that step times are measured on; 0.25 takes four times as long."""
    up_mbps: Annotated[float, Field(gt=0)] | None = None
    """Uplink in megabits (10^6) per second; default: transfers cost no time."""
    down_mbps: Annotated[float, Field(gt=0)] | None = None
    """Downlink in megabits (10^6) per second; default: transfers cost no time."""
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds before each transfer begins."""
    dropout: Fraction = 0.0
    """Probability that a client of this tier, asked to take part in a round, drops out of it."""

    @property
    def capacity(self) -> Capacity:
        """What the tier's devices can hold less than others."""
        limits = {"lora_rank": self.lora_rank, "reft_layers": self.reft_layers}
        set_limits = {name: value for name, value in limits.items() if value is not None}
        return set_limits if self.mask_ratio == 1 else {"mask_ratio": self.mask_ratio, **set_limits}

    @property
    def quantised(self) -> Quantised | None:
        """How the linear layers of the base model are quantised; None: they are not."""
        return self.precision if self.precision == "nf4" or self.precision == "int8" else None

    def dtype(self, common: Dtype) -> Dtype:
        """Return the type in which the tier computes with the base model.

        Args:
            common: `model.dtype`.
        """
        if self.precision is None or self.precision == "nf4" or self.precision == "int8":
            return common
        return self.precision

    @property
    def fuse_width(self) -> int:
        """How many clients are trained in one step; 1 if they are trained one by one, and until it is found."""
        return self.fuse if isinstance(self.fuse, int) and self.batches_clients else 1

    @property
    def batches_clients(self) -> bool:
        """Whether several clients of the tier can be trained in one step."""
        return self.engine.batches_clients and self.workers == 1

    @model_validator(mode="before")
    @classmethod
    def _engine(cls, value: Any) -> Any:
        known = cls.model_fields.keys() - {"engine"}
        return parse_tier_engine(value, known) if isinstance(value, Mapping) else value

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A built-in engine's fields beside its name, as in YAML."""
        dumped: dict[str, Any] = handler(self)
        flat: dict[str, Any] = {}
        for name, value in dumped.items():
            if name == "engine" and isinstance(value, dict) and "name" in value:
                flat |= {name: value["name"], **{field: value[field] for field in type(self.engine).model_fields}}
            else:
                flat[name] = value
        return flat

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.share is None) == (not self.clients):
            raise ValueError("a tier needs either `share` or `clients` (a list of ids)")
        if named := sorted({"CPU", "GPU", "memory"} & set(self.resources)):
            raise ValueError(f"resources: {choices(named)} have fields of their own: num_cpus, num_gpus, memory")
        if self.quantised and not self.engine.holds_quantised:
            able = engines_with("holds_quantised")
            raise ValueError(f"precision: {self.quantised} needs engine: {able}, got {self.engine.label}")
        if isinstance(self.fuse, int) and not self.batches_clients:
            able = engines_with("batches_clients")
            raise ValueError(f"fuse: {self.fuse} clients in one step need engine: {able} and workers: 1")
        if self.workers > 1 and not self.engine.groups_processes:
            able = engines_with("groups_processes")
            raise ValueError(
                f"workers: {self.workers} processes train one client with engine: {able}, got {self.engine.label}"
            )
        return self


class UpdateChecks(Section):
    finite: bool = True
    """No number is NaN or infinite."""
    shape: bool = True
    """Arrays have the names, types and shapes with which the method was counted (`fedray params`)."""
    norm: Annotated[float, Field(gt=1)] | None = None
    """Root mean square of its numbers, at most so many times the median of the round's clients. Given, methods that
    average get all updates one by one."""
    distance: Annotated[float, Field(gt=1)] | None = None
    """Distance from the coordinatewise median of the round's updates of its shape, at most so many times the median of
    these distances: finds a flipped sign, and training in the wrong direction that leads further than honest clients
    differ. Given, methods that average get all updates one by one."""

    @property
    def compare(self) -> bool:
        """Whether updates are compared with each other."""
        return self.norm is not None or self.distance is not None


@cache
def _only_tier() -> TierConfig:
    return TierConfig(share=1.0)


class ClientsConfig(Section):
    count: PositiveInt | None = None
    """Number of clients K. by_column, by_file: taken from the data; given, the `count` largest are kept."""
    per_round: PositiveInt | None = None
    """Cohort size; default all."""
    num_cpus: Annotated[float, Field(gt=0)] | None = None
    """CPUs of one client actor; may be a fraction. Default: 1, or an equal share where there are more tiers than CPUs
    in the cluster."""
    num_gpus: Gpus | None = None
    """GPUs of one client actor; may be a fraction. Default: an equal share of the cluster's, 0 where it has none now:
    where an autoscaler shall add GPU nodes, say how much."""
    actors: PositiveInt | None = None
    """Number of client actors; default as many as the cluster can hold, and no more than the cohort can use."""
    fuse: Fuse | None = None
    """Clients of a tier that are trained in one step: their batches go through the frozen base model together, each
    client's adapter acts on its own. Faster for small batches; results differ by rounding. A number, `off`, or `auto`:
    found for each tier at the start, and kept in the run's config.yaml. On a CPU, some steps of the first method are
    timed; on a GPU, where more clients are always faster, it is as many as the actor's share of the GPU's memory holds
    by prediction, at most 64. Default: `auto` on a GPU, `off` on a CPU."""
    share_base: bool = True
    """Client actors on parts of one GPU hold the frozen base model once. False: each holds its own."""
    threads: PositiveInt | None = None
    """Threads of torch per client actor. Default: 1, since actors share the node's cores, and an actor on a GPU only
    starts its kernels. On a GPU with an engine that moves the parameters on the host (`offload`): 4, or the tier's
    num_cpus if that is more, since the optimizer's step is limited by the memory's bandwidth, which one thread does not
    use up and a few do."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a client is run again in a round, elsewhere if possible, after an exception, a timeout, or the death of
    the actor that trained it. Training that diverges would do so again and is not run again."""
    on_failure: Literal["fail", "drop"] = "fail"
    """What becomes of a round in which a client failed more often than that: the run ends, or goes on without it."""
    min_clients: PositiveInt = 1
    """A round that fewer clients finish because others failed ends the run."""
    client_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds without any progress after which an actor is ended, and its clients run again. Must be longer than the
    slowest client's task, or that of `fuse` clients if they train together. Default: no limit."""
    update_checks: UpdateChecks = UpdateChecks()
    """What keeps a client's update out of a round."""
    over_selection: Annotated[float, Field(ge=0)] = 0.0
    """A round asks this share more than `per_round`, and takes the `per_round` whose updates would arrive first."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Simulated seconds after which a round takes no more updates."""
    example_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds in which the reference device (speed 1) trains on one example, for deadlines and over-selection. Default:
    measured once at the start of the run, and kept in its config.yaml."""
    tiers: dict[str, TierConfig] = Field(default_factory=dict)
    """Capacity tiers by name; each client is assigned to one by seed. Default: one tier, `default`."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        shares = [tier.share for tier in self.tiers.values() if tier.share is not None]
        if shares and abs(sum(shares) - 1) > ROUNDING:
            raise ValueError(
                f"the shares of the tiers {choices(self.tiers)} add up to {sum(shares):g}; they must add up to 1"
            )
        listed = [id for tier in self.tiers.values() for id in tier.clients]
        if twice := sorted({id for id in listed if listed.count(id) > 1}):
            raise ValueError(f"tiers: {choices(twice)} listed twice; a client belongs to one tier")
        if self.count and self.per_round and self.per_round > self.count:
            raise ValueError(f"per_round is {self.per_round}, but there are only {self.count} clients (clients.count)")
        if self.over_selection and not self.per_round:
            raise ValueError("over_selection: needs per_round; without it every client is asked anyway")
        return self

    @property
    def needs_example_seconds(self) -> bool:
        """Whether who is aggregated depends on simulated time."""
        return self.deadline_s is not None or self.over_selection > 0

    def tier(self, name: str) -> TierConfig:
        """Return the tier of that name with what it leaves out filled in from all clients; without tiers, the only
        one, `default`."""
        tier = self.tiers[name] if self.tiers else _only_tier()
        common = {field: getattr(self, field) for field in ("num_cpus", "num_gpus", "actors", "fuse")}
        return tier.model_copy(update={f: value for f, value in common.items() if getattr(tier, f) is None})

    def tier_threads(self, tier: TierConfig, device: str) -> int:
        """Return the threads of torch in an actor of the tier.

        Args:
            device: cuda or cpu, where the tier computes.
        """
        if self.threads is not None:
            return self.threads
        if device == "cuda" and tier.engine.steps_on_host:
            return max(HOST_STEP_THREADS, int(tier.num_cpus or 0))
        return 1

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Names of all tiers, in the configuration's order."""
        return tuple(self.tiers) or ("default",)
