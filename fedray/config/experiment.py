"""An experiment: the sections together with the methods that it compares."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedray.config.checkpoint import CheckpointConfig
from fedray.config.clients import ClientsConfig, TierConfig
from fedray.config.data import AnySource
from fedray.config.model import ModelConfig
from fedray.config.partition import PARTITIONERS, AnyPartitioner
from fedray.config.section import PositiveInt, Section, absolute, describe
from fedray.config.tracker import Tracker, TrackerOption
from fedray.config.training import EvaluationConfig, LoraSection, ReftSection, TrainConfig
from fedray.errors import choices
from fedray.types import Task

Head = Literal["shared", "local", "frozen_label_text", "frozen_random"]


class MethodConfig(BaseModel):
    """One method of the comparison: its name, sections that override the common ones, and its own hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, use_attribute_docstrings=True)

    name: str | None = None
    """Name of a built-in method."""
    class_: str | None = Field(default=None, alias="class")
    """`module.Class` of a method of your own."""
    label: str | None = None
    """Name in tables and folders; default the method's name. Needed when one method occurs twice."""
    head: Head | None = None
    lora: dict[str, Any] = {}
    reft: dict[str, Any] = {}
    train: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.name is None) == (self.class_ is None):
            raise ValueError("a method needs either `name` (built in) or `class` (module.Class of your own)")
        return self

    @property
    def key(self) -> str:
        """Unique name of this entry within the experiment."""
        return self.label or self.name or (self.class_ or "").rsplit(".", 1)[-1]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The keys that belong to the method itself."""
        return dict(self.model_extra or {})


class CallbackConfig(BaseModel):
    """A callback of a user's own, with the arguments that it is made with."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, use_attribute_docstrings=True)

    class_: str = Field(alias="class")
    """`module.Class`, derived from `fedray.Callback`."""


class Config(Section):
    """An experiment: one federation, trained by one or more methods."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the experiment; part of its folder's name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Keys every random draw."""
    rounds: PositiveInt
    """Rounds T of federated training."""
    method: tuple[MethodConfig, ...]
    """A name, a mapping with `name` and hyperparameters, or a list of these to compare."""
    task: Task = "classification"
    """classification and regression read a label with a task head; causal_lm continues text and has no head."""
    head: Head | None = None
    """Task head: trained and averaged, trained and private, or frozen to embeddings of the label names or to one random
    draw for all clients. Left out: each method's own default, which is `shared` unless the method says otherwise."""
    model: ModelConfig
    data: AnySource
    partition: AnyPartitioner = Field(default_factory=lambda: PARTITIONERS.parse({}))
    clients: ClientsConfig = ClientsConfig()
    lora: LoraSection = LoraSection()
    reft: ReftSection = ReftSection()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    callbacks: tuple[CallbackConfig, ...] = ()
    """Receive what happens, each as `{class: module.Class}` with further arguments."""
    tracking: tuple[TrackerOption, ...] = ()
    """Trackers that show the run elsewhere: `tensorboard`, `wandb`, `mlflow`, each with its options, or a class of your
    own. One or a list."""
    report: bool = False
    """Write report.html into the run's folder at its end: tables and figures in one file, which needs no network. A
    sweep writes one for all its trials."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    runtime: Literal["ray", "inline"] = "ray"
    """inline: everything in this process, without Ray, one client after another; the same numbers."""
    storage_path: str = "runs"
    """Folder in which the folders of runs are made: a path, or a URI of pyarrow.fs (s3://, gs://, ...)."""

    @field_validator("method", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple({"name": entry} if isinstance(entry, str) else entry for entry in entries)

    @field_validator("tracking", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Mapping | Tracker) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys = [entry.key for entry in self.method]
        if not keys:
            raise ValueError("method: name at least one method")
        for key in keys:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key):
                raise ValueError(
                    f"method: {key!r} cannot name a folder; give this entry a `label` of letters and digits"
                )
            if keys.count(key) > 1:
                raise ValueError(
                    f"method: {key!r} occurs {keys.count(key)} times; give each entry a `label` of its own"
                )
        if self.model.path == "random" and "model_type" not in self.model.config:
            raise ValueError(
                "model.config: a random model needs `model_type` (for example bert, llama, gpt_neox, qwen2)"
            )
        if self.model.path == "random" and self.model.tokenizer is None:
            raise ValueError("model.tokenizer: a random model has none of its own; name one, for example `bytes`")
        if self.task != "causal_lm":
            for path, section in {"data": self.data, **self.data.sections_by_path}.items():
                for field in ("format", "chat_template"):
                    if getattr(section, field) is not None:
                        raise ValueError(f"{path}.{field}: only for task causal_lm, not {self.task}")
        for name in self.clients.tier_names:
            if self.device == "cuda" and self.clients.tier(name).num_gpus == 0:
                of_tier = f" (tier {name!r})" if self.clients.tiers else ""
                raise ValueError(f"device: `cuda` needs clients.num_gpus above 0 (or left out), got 0{of_tier}")
        for entry in self.method:
            for name in self.clients.tier_names:
                self.section_for(entry, name)
            try:
                self.section_for(entry).train.check_rounds(self.rounds)
            except ValueError as error:
                raise ValueError(f"method {entry.key!r}: train.{error}") from None
            head = self.section_for(entry).head
            if head == "frozen_label_text" and self.task == "regression":
                raise ValueError(f"method {entry.key!r}: head {head!r} needs label names; a regression has none")
        return self

    @property
    def requested_clients(self) -> ClientsConfig:
        """The section `clients` by which actors request resources: without GPUs if the experiment runs on CPUs."""
        if self.device != "cpu":
            return self.clients
        tiers = {name: tier.model_copy(update={"num_gpus": 0.0}) for name, tier in self.clients.tiers.items()}
        return self.clients.model_copy(update={"num_gpus": 0.0, "tiers": tiers})

    def with_absolute_paths(self, folder: Path) -> Self:
        """Return this configuration with absolute paths, which mean the same in every process; relative ones are below
        `folder`."""
        tiers = {
            name: tier.model_copy(update={"engine": tier.engine.with_absolute_paths(folder)})
            for name, tier in self.clients.tiers.items()
        }
        return self.model_copy(
            update={
                "model": self.model.with_absolute_paths(folder),
                "data": self.data.with_absolute_paths(folder),
                "clients": self.clients.model_copy(update={"tiers": tiers}),
                "storage_path": absolute(self.storage_path, folder),
            }
        )

    def section_for(self, entry: MethodConfig, tier: str | None = None) -> "MethodSections":
        """Return the common sections with this method's overrides applied, and with what a tier's devices can hold.

        The LoRA branch keeps its scale alpha / rank on every tier, so that equal components mean the same everywhere.

        Raises:
            ValueError: an override does not fit its section, or a tier holds more than there is.
        """
        sections: dict[str, Any] = {}
        for name, common in (("lora", self.lora), ("reft", self.reft), ("train", self.train)):
            try:
                sections[name] = type(common).model_validate(common.model_dump() | getattr(entry, name))
            except ValidationError as error:
                mistakes = "; ".join(f"{name}.{line}" for line in describe(error, type(common)))
                raise ValueError(f"method {entry.key!r}: {mistakes}") from None
        common_sections = MethodSections(head=entry.head or self.head, **sections)
        if tier is None:
            return common_sections
        try:
            return common_sections.on(self.clients.tier(tier))
        except ValueError as error:
            raise ValueError(f"clients.tiers.{tier}.{error} of method {entry.key!r}") from None


class MethodSections(Section):
    """What one method of the comparison uses of the common sections."""

    head: Head | None
    lora: LoraSection
    reft: ReftSection
    train: TrainConfig

    def on(self, tier: TierConfig) -> Self:
        """Return what a client of the tier uses.

        Raises:
            ValueError: the tier holds more than there is.
        """
        lora, reft, train = self.lora, self.reft, self.train
        if (rank := tier.lora_rank) is not None:
            if rank > lora.rank:
                raise ValueError(f"lora_rank: {rank} is above lora.rank {lora.rank}")
            lora = lora.model_copy(update={"rank": rank, "alpha": lora.alpha * rank / lora.rank})
        if (layers := tier.reft_layers) is not None:
            if reft.layers != "all" and (extra := sorted(set(layers) - set(reft.layers))):
                raise ValueError(f"reft_layers: {choices(extra)} are not among reft.layers {choices(reft.layers)}")
            reft = reft.model_copy(update={"layers": layers})
        own = {name: value for name in ("batch_size", "accumulation") if (value := getattr(tier, name)) is not None}
        # A silo's workers share the micro-batches of a step among them; a single process would take them all.
        own["accumulation"] = own.get("accumulation", train.accumulation) * tier.workers
        return self.model_copy(update={"lora": lora, "reft": reft, "train": train.model_copy(update=own)})
