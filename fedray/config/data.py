"""The sections `model`, `data` and `partition`: what is fine-tuned, on which examples, and how clients get them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from fedray.config.clients import Precision
from fedray.config.section import Fraction, PositiveInt, Section


class ModelConfig(Section):
    path: str
    """Hub id, local folder, `package:NAME` (the folder with a config.json inside an installed Python package), or
    `random` (weights drawn from the seed, architecture from `config`)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """For `random`: a transformers configuration (`model_type` and its fields). Otherwise: overrides of its fields."""
    tokenizer: str | None = None
    """Hub id, local folder, `package:NAME`, or `bytes` (one token per UTF-8 byte). Default: the model's own."""
    revision: str | None = None
    """Git revision on the hub."""
    dtype: Precision = "float32"
    """Type of the frozen base weights; adapters are always float32. A tier may have its own (`precision`)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless you know its author."""


class DataConfig(Section):
    source: Literal["hub", "files", "docstrings", "synthetic"]
    """Where examples come from."""
    name: str | None = None
    """hub: dataset id or local dataset folder."""
    config: str | None = None
    """hub: dataset configuration."""
    splits: dict[Literal["train", "validation", "test"], str] = Field(default_factory=dict)
    """hub: which of its splits serve as train, validation, test. Default: those with these names."""
    files: dict[str, str | dict[str, str]] = Field(default_factory=dict)
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
