"""`hub`: a dataset of the Hugging Face hub, or a local dataset folder; its code is never run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fedray.config import DataConfig, RawRows, absolute
from fedray.errors import DataError, choices, nearest, one_line
from fedray.types import SPLITS, Role, Task


class Hub(DataConfig):
    """One dataset: it is one task, and its name is the only natural client."""

    name: str | None = None
    """Dataset id or local dataset folder."""
    config: str | None = None
    """Dataset configuration."""
    splits: dict[Role, str | dict[str, str]] = Field(default_factory=dict)
    """Which of its splits serve as train, validation, test, and common: test examples on which every client's model is
    evaluated. Several test sets are {test: {NAME: SPLIT, ...}}, each scored apart, too; common likewise. A split may
    be a slice, or several, as in the library `datasets`: train[:1000], train[10%:20%], train[:80%]+validation. Default:
    those named train, validation and test."""

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if not self.name:
            raise ValueError("name: the source `hub` needs the name of a dataset")
        return self

    @field_validator("splits")
    @classmethod
    def _sets_of_tests(cls, value: dict[Role, Any]) -> dict[Role, Any]:
        if wrong := [split for split in ("train", "validation") if isinstance(value.get(split), dict)]:
            raise ValueError(f"splits.{wrong[0]}: expected a split's name; only test and common name several sets")
        return value

    def with_absolute_paths(self, folder: Path) -> Self:
        found = absolute(self.name or "", folder)
        named = {"name": found} if Path(found).is_dir() else {}  # otherwise an id of the hub
        return super().with_absolute_paths(folder).model_copy(update=named)

    def load(self, task: Task, seed: int, num_clients: int | None) -> list[RawRows]:
        name = self.name or ""
        available = self._open(name)
        wanted: Mapping[Any, Any] = self.splits or {split: split for split in SPLITS if split in available}
        if "train" not in wanted:
            raise DataError(
                f"data.splits: name the split of {name!r} that serves as train; it has: {choices(available)}"
            )
        return [
            replace(raw, test_set=test_set)
            for role, entry in wanted.items()
            for test_set, theirs in (entry if isinstance(entry, dict) else {"": entry}).items()
            for raw in self._rows(role, theirs, available)
        ]

    def _open(self, name: str) -> dict[str, Any]:
        """Return the dataset's splits by their own names."""
        import datasets  # a second of imports that other sources do not need

        folder = Path(name).expanduser()
        try:
            if any((folder / marker).exists() for marker in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder) if folder.is_dir() else name, self.config)
        except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow each raise their own kinds
            reasons = ": ".join(one_line(cause) for cause in (error, error.__cause__) if isinstance(cause, Exception))
            raise DataError(
                f"data.name: the dataset {name!r} could not be loaded: {reasons}. Without a "
                "connection to the hub, name a local dataset folder, use `source: files`, or set HF_HOME to a folder "
                "into which it was downloaded before"
            ) from error
        return dict(found) if isinstance(found, dict) else {"train": found}

    def _rows(self, role: Role, wanted: str, available: Mapping[str, Any]) -> Iterator[RawRows]:
        """Yield the rows of a split, or of the slices of splits that `wanted` names."""
        task = self.config or Path(self.name or "").name
        for theirs, first, end in self._slices(role, wanted, available):
            dataset = available[theirs]
            columns: dict[str, Sequence[Any]] = dataset.with_format("arrow")[first:end].to_pydict()
            for column, feature in dataset.features.items():
                if hasattr(feature, "int2str"):
                    # The hub's convention for a split without labels is class -1.
                    named = [feature.int2str(v) if v is not None and v >= 0 else None for v in columns[column]]
                    columns[column] = named
            where = f"{self.name}, split {theirs}"
            yield RawRows(where, columns, role, task, task, range(first + 1, end + 1))

    def _slices(self, role: Role, wanted: str, available: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """Return the splits that `wanted` names, each with its first row and the one after its last.

        Raises:
            DataError: there is no such split, the slice cannot be read, or it has no rows.
        """
        import datasets

        if wanted in available:
            return [(wanted, 0, available[wanted].num_rows)]
        for part in wanted.split("+"):
            theirs = part.partition("[")[0].strip()
            if theirs not in available:
                raise DataError(
                    f"data.splits.{role}: {self.name!r} has no split {theirs!r}{nearest(theirs, available)}; "
                    f"it has: {choices(available)}"
                )
        sizes = {theirs: dataset.num_rows for theirs, dataset in available.items()}
        spec = "+".join(part.strip() for part in wanted.split("+"))
        try:
            found = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"data.splits.{role}: {wanted!r}: {one_line(error)}; a slice is written as in train[:1000], "
                "train[10%:20%] or train[-50:]"
            ) from None
        for part in found:
            if part.from_ >= part.to:
                raise DataError(
                    f"data.splits.{role}: {wanted!r} has no rows: the split {part.splitname!r} has "
                    f"{sizes[part.splitname]:,}"
                )
        return [(part.splitname, part.from_, part.to) for part in found]


ENTRY = Hub
