"""The configuration of an experiment: YAML (or a dict) into frozen, fully checked models.

This is the only file that parses YAML. What can be checked from the text alone is checked here; what needs the data
or the model is checked by `fedray.prepare`, also before any actor starts.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedray.errors import ConfigError, choices, nearest
from fedray.types import Task

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Head = Literal["shared", "local", "frozen_label_text"]


class Section(BaseModel):
    """Frozen, no unknown keys; attribute docstrings are the fields' documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads `true` as 1; a rank of `true` is a mistake, not a one."""
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(entry, bool) for entry in given):
            assert info.field_name is not None
            if _holds_numbers(cls.model_fields[info.field_name].annotation):
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


class ModelConfig(Section):
    path: str
    """Hub id, local folder, `package:NAME` (the folder with a config.json inside an installed Python package), or
    `random` (weights drawn from the seed, architecture from `config`)."""
    config: dict[str, Any] = {}
    """For `random`: a transformers configuration (`model_type` and its fields). Otherwise: overrides of its fields."""
    tokenizer: str | None = None
    """Hub id, local folder, `package:NAME`, or `bytes` (one token per UTF-8 byte). Default: the model's own."""
    revision: str | None = None
    """Git revision on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen base weights; adapters are always float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless you know its author."""


class DataConfig(Section):
    source: Literal["hub", "files", "docstrings", "synthetic"]
    """Where examples come from."""
    name: str | None = None
    """hub: dataset id or local dataset folder."""
    config: str | None = None
    """hub: dataset configuration."""
    splits: dict[Literal["train", "validation", "test"], str] = {}
    """hub: which of its splits serve as train, validation, test. Default: those with these names."""
    files: dict[str, str | dict[str, str]] = {}
    """files: {train: PATH, validation: PATH, test: PATH}, or one such mapping (or one path) per task or client:
    {NAME: {train: PATH, ...}} or {NAME: PATH}. jsonl, JSON array (.json), .csv, .parquet; a path may hold `*`."""
    text: str = "text"
    """Column with the (first) text of a classification or regression example."""
    text_pair: str | None = None
    """Column with the second text of a sentence pair."""
    label: str = "label"
    """Column with the label (class name or number; a number for regression)."""
    prompt: str = "{prompt}"
    """causal_lm: template of what the model reads, with {column} fields; no loss here."""
    answer: str = "{answer}"
    """causal_lm: template of what it must continue with; the loss is taken here (and on the end-of-text token)."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] = 128
    """Longest example in tokens; longer ones are cut at the end (causal_lm: the prompt is cut from its start, down to
    a quarter of this, then the answer at its end)."""
    max_examples: PositiveInt | None = None
    """Keep at most this many training examples, drawn by seed."""
    max_test_examples: PositiveInt | None = None
    """Keep at most this many examples of a test split that the source itself has, drawn by seed."""
    max_per_class: PositiveInt | None = None
    """Keep at most this many training examples per class, drawn by seed."""
    libraries: tuple[str, ...] = ()
    """docstrings: import names of installed libraries, `stdlib` for the standard library. Default: those with most."""
    max_per_client: PositiveInt | None = 200
    """docstrings: keep at most this many examples per library, balanced over kinds as far as they exist; null: all."""
    groups: PositiveInt = 2
    """synthetic: number of latent groups of clients."""
    classes: Annotated[int, Field(ge=2)] = 4
    """synthetic: number of classes."""
    examples_per_client: PositiveInt = 60
    """synthetic: examples per client, test and validation included."""
    conflict: Annotated[float, Field(ge=0, le=1)] = 1.0
    """synthetic: share of classes whose labels are permuted differently in every latent group (0: no groups at all)."""
    cache_dir: str = "~/.cache/fedray"
    """Where tokenised data is kept, by content."""


class PartitionConfig(Section):
    kind: Literal[
        "iid", "dirichlet", "shards", "quantity_skew", "by_column", "by_file", "distinct_task", "mixed_task"
    ] = "iid"
    """How examples are dealt to clients; each goes to exactly one. by_file also serves `docstrings` (file = library)
    and `synthetic` (file = planted client)."""
    alpha: Annotated[float, Field(gt=0)] = 0.3
    """dirichlet, quantity_skew, mixed_task: concentration; smaller is more skewed."""
    classes_per_client: PositiveInt = 2
    """shards: classes that each client holds (at least one of each class's shards)."""
    column: str | None = None
    """by_column: the column whose values are the clients. dirichlet, shards: the column to skew on, default label."""
    min_examples: PositiveInt = 4
    """Fewest training examples that every client must get."""
    validation_fraction: Fraction = 0.15
    """Share of each client's training examples kept for validation where the source has no validation split."""
    test_fraction: Fraction = 0.25
    """Share of each client's examples kept for testing where the source has no test split."""


class TierConfig(Section):
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of all clients that belong to this tier; the shares of all tiers add up to 1."""
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """FedHFT's ρ: share of output rows that a client of this tier can hold."""


class ClientsConfig(Section):
    count: PositiveInt | None = None
    """Number of clients K. by_column, by_file: taken from the data; given, the `count` largest are kept."""
    per_round: PositiveInt | None = None
    """Cohort size; default all."""
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one client actor; may be a fraction."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of one client actor; may be a fraction. Default: an equal share of the cluster's, 0 where it has none."""
    actors: PositiveInt | None = None
    """Number of client actors; default as many as the cluster can hold, and no more than the cohort can use."""
    threads: PositiveInt = 1
    """Threads of torch per client actor."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a client is run again elsewhere in a round after the actor that trained it died."""
    tiers: dict[str, TierConfig] = {}
    """Capacity tiers by name; clients are dealt to them by seed. Default: one tier, `default`."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = sum(tier.share for tier in self.tiers.values())
        if self.tiers and abs(total - 1) > 1e-6:
            raise ValueError(
                f"the shares of the tiers {choices(self.tiers)} add up to {total:g}; they must add up to 1"
            )
        if self.count and self.per_round and self.per_round > self.count:
            raise ValueError(f"per_round is {self.per_round}, but there are only {self.count} clients (clients.count)")
        return self


class LoraSection(Section):
    rank: PositiveInt = 8
    """r."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """lora_alpha; the branch is scaled by s = alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the LoRA input."""
    targets: tuple[str, ...] = ()
    """Names of the target linear layers (last part of the module path, e.g. q_proj). Default: query and value."""


class ReftSection(Section):
    kind: Literal["loreft", "noreft", "direft", "nodireft"] = "loreft"
    """Intervention; see METHODS: direft keeps R orthonormal (as pyreft), nodireft does not (as the ReFT paper)."""
    rank: PositiveInt = 4
    """r."""
    layers: Literal["all"] | tuple[int, ...] = "all"
    """Indices of the blocks whose output is edited."""
    positions: Annotated[str, Field(pattern=r"^(all|f\d+(\+l\d+)?|l\d+)$")] = "f1+l1"
    """`all`, or `f<p>+l<s>`: the first p and the last s non-padding tokens."""
    tie_positions: bool = False
    """Whether prefix and suffix share one intervention."""
    dropout: Fraction = 0.0
    """Dropout on the intervened representation."""


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the client's training examples per round."""
    max_steps: PositiveInt | None = None
    """At most this many optimizer steps per round."""
    batch_size: PositiveInt = 8
    """Examples per micro-batch."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Its state starts afresh each round."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the task head; default `lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's running averages."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator."""
    momentum: Fraction = 0.0
    """SGD only."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null: no clipping."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate within a round: constant, or linear decay to 0."""
    round_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of round t is lr · round_decay^t."""


class EvaluationConfig(Section):
    every: Annotated[int, Field(ge=0)] = 1
    """Measure test accuracy before and after local training in every n-th round; 0: only at the end."""
    metric: (
        Literal["accuracy", "matthews", "pearson", "token_accuracy", "perplexity", "exact_match", "rouge_l"] | None
    ) = None
    """Default: accuracy (classification), pearson (regression), token_accuracy (causal_lm)."""
    batch_size: PositiveInt = 32
    """Examples per batch."""
    max_new_tokens: PositiveInt = 32
    """exact_match, rouge_l: longest generated answer."""


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
    head: Head = "shared"
    """Task head: trained and averaged, trained and private, or frozen to embeddings of the label names."""
    model: ModelConfig
    data: DataConfig
    partition: PartitionConfig = PartitionConfig()
    clients: ClientsConfig = ClientsConfig()
    lora: LoraSection = LoraSection()
    reft: ReftSection = ReftSection()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    runtime: Literal["ray", "inline"] = "ray"
    """inline: everything in this process, without Ray, one client after another; the same numbers."""
    storage_path: str = "runs"
    """Folder in which the folders of runs are made."""

    @field_validator("method", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple({"name": entry} if isinstance(entry, str) else entry for entry in entries)

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
        if self.data.source == "hub" and not self.data.name:
            raise ValueError("data.name: the source `hub` needs the name of a dataset")
        if self.data.source == "files" and not self.data.files:
            raise ValueError("data.files: the source `files` needs at least {train: PATH}")
        if self.partition.kind == "by_column" and not self.partition.column:
            raise ValueError(
                "partition.column: the partition `by_column` needs the column whose values are the clients"
            )
        if self.device == "cuda" and self.clients.num_gpus == 0:
            raise ValueError("device: `cuda` needs clients.num_gpus above 0 (or left out), got 0")
        for entry in self.method:
            head = self.section_for(entry).head
            if head == "frozen_label_text" and self.task == "regression":
                raise ValueError(f"method {entry.key!r}: head {head!r} needs label names; a regression has none")
        return self

    def section_for(self, entry: MethodConfig) -> "MethodSections":
        """Return the common sections with this method's overrides applied.

        Raises:
            ValueError: an override does not fit its section.
        """
        sections: dict[str, Any] = {}
        for name, common in (("lora", self.lora), ("reft", self.reft), ("train", self.train)):
            try:
                sections[name] = type(common).model_validate(common.model_dump() | getattr(entry, name))
            except ValidationError as error:
                mistakes = "; ".join(f"{name}.{line}" for line in describe(error, type(common)))
                raise ValueError(f"method {entry.key!r}: {mistakes}") from None
        return MethodSections(head=entry.head or self.head, **sections)


class MethodSections(Section):
    """What one method of the comparison uses of the common sections."""

    head: Head
    lora: LoraSection
    reft: ReftSection
    train: TrainConfig


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 and 1e5 as numbers (YAML 1.1 wants a dot and a sign) and refuses double keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} as a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number, such as the git revision 1234e56."""


_NUMBER = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document.

    Raises:
        ConfigError: it is not YAML; the message has line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def load_config(source: Config | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration from a file, a mapping or another configuration, and apply dotted overrides.

    overrides: {"section.key": value}; the path of a list element is its index ("method.0.head").

    Raises:
        ConfigError: missing file, malformed YAML, unknown key, wrong type, out of range. The message says where, what
            came, what is allowed, and the nearest valid name.
    """
    if isinstance(source, Config):
        where, raw = "configuration", to_mapping(source)
    elif isinstance(source, Mapping):
        where, raw = "configuration", _plain(source)
    else:
        where = str(source)
        try:
            raw = parse_yaml(Path(source).read_text(encoding="utf-8"), where)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping of sections, got {type(raw).__name__}")
    for path, value in (overrides or {}).items():
        _override(raw, path, _plain(value))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in describe(error))) from None


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `section.key=value` arguments into overrides; values are YAML.

    Raises:
        ConfigError: an argument without `=`.
    """
    overrides = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"override {argument!r}: expected section.key=value, for example rounds=10 or train.lr=1e-3"
            )
        overrides[path] = parse_yaml(value, f"override {path}")
    return overrides


def to_mapping(config: Section) -> dict[str, Any]:
    """Return a configuration as plain YAML values."""
    return config.model_dump(mode="json", by_alias=True)


def dump_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(to_mapping(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Return a copy of a value from Python as YAML could have held it.

    Raises:
        ConfigError: YAML could not have held it.
    """
    if isinstance(value, BaseModel):
        return to_mapping(value) if isinstance(value, Section) else value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"configuration: {value!r} is of type {type(value).__name__}; allowed: text, numbers, lists, mappings, null"
    )


def _override(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set one dotted path in a nested mapping, in place."""
    target: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise ConfigError(f"override {path}: {part!r} is not an index below {len(target)}")
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            raise ConfigError(f"override {path}: {part!r} lies inside a plain value, not a section")
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"override {path}: {last!r} lies inside a plain value, not a section")


def describe(error: ValidationError, root: type[BaseModel] = Config) -> Iterator[str]:
    """Return one line per mistake in a `root`: where, what came, what is allowed, the nearest valid name."""
    for entry in error.errors():
        where = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            *parents, key = entry["loc"]
            known = _fields_at(root, [str(part) for part in parents])
            yield f"{where}: unknown key{nearest(str(key), known)}; allowed: {choices(known)}"
        elif entry["type"] == "missing":
            yield f"{where}: missing"
        elif entry["type"] == "value_error":
            yield f"{where}: {entry['ctx']['error']}" if where else str(entry["ctx"]["error"])
        else:
            came = entry["input"]
            hint = nearest(came, re.findall(r"'([^']*)'", entry["msg"])) if isinstance(came, str) else ""
            yield f"{where}: got {came!r}: {entry['msg']}{hint}"


def _holds_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(_holds_numbers(part) for part in get_args(annotation))


def _fields_at(root: type[BaseModel], path: list[str]) -> list[str]:
    """Return the names of the fields of the section at `path` below `root`."""
    section: Any = root
    for part in path:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            break
        annotation = fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return sorted(section.model_fields)
