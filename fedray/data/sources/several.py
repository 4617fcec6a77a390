"""`several`: several sources in one experiment, each one task, with columns, templates and limits of its own.

data:
  source: several
  prompt: "{question}\\n"
  max_length: 256
  parts:
    gsm8k: {source: hub, name: openai/gsm8k, config: main, answer: "{answer}", max_examples: 1000}
    boolq: {source: files, files: {train: boolq.jsonl}, prompt: "{passage}\\n{question}\\n", answer: "{label}"}
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from fedray.config import DataConfig, RawRows
from fedray.config.data import AnySource
from fedray.config.section import Mistakes
from fedray.errors import DataError
from fedray.types import Task

SHARED = ("chat_template", "max_length", "cache_dir")
"""Fields that all parts have in common."""
COLUMNS = ("text", "text_pair", "label", "choices", "choice_labels")
TEMPLATES = ("prompt", "answer")
INHERITED = (*COLUMNS, *TEMPLATES, "format")
"""Fields that a part takes from the section around it where it leaves them out."""


class Several(DataConfig):
    """Every part is a task. Its natural client has its name; a part with several of them names each PART/CLIENT."""

    parts: dict[str, AnySource] = Field(default_factory=dict)
    """{NAME: section}: a complete section `data` per task, without max_length, chat_template and cache_dir. The limits
    of a part (max_examples, ...) are its own, and those outside are of all parts together, afterwards. Columns,
    templates and format that a part leaves out are those outside. All parts have one set of classes."""

    @field_validator("parts")
    @classmethod
    def _fit_for_parts(cls, parts: dict[str, DataConfig]) -> dict[str, DataConfig]:
        mistakes = []
        for name, part in parts.items():
            if not name or name != name.strip():
                mistakes.append(f"{name}: a part needs a name, without blanks around it")
            if isinstance(part, Several):
                mistakes.append(f"{name}.source: a part has no parts of its own; write them beside it")
            for field in SHARED:
                if field in part.model_fields_set:
                    mistakes.append(f"{name}.{field}: all parts have the same; set data.{field}")
        if mistakes:
            raise Mistakes(mistakes)
        return parts

    @model_validator(mode="after")
    def _has_parts(self) -> Self:
        if not self.parts:
            raise ValueError("parts: the source `several` needs at least one part: {NAME: {source: ...}}")
        return self

    @field_serializer("parts")
    def _own_fields(self, parts: dict[str, DataConfig]) -> dict[str, dict[str, Any]]:
        """Return the parts without what they take from outside: changed there, it changes for them, too."""
        left_out = {name: {*SHARED, *INHERITED} - (part.model_fields_set - {*SHARED}) for name, part in parts.items()}
        return {
            name: part.model_dump(mode="json", by_alias=True, exclude=left_out[name]) for name, part in parts.items()
        }

    def with_absolute_paths(self, folder: Path) -> Self:
        parts = {
            name: part.with_absolute_paths(folder).model_copy(update={"cache_dir": part.cache_dir})
            for name, part in self.parts.items()
        }
        return super().with_absolute_paths(folder).model_copy(update={"parts": parts})

    @property
    def sections_by_path(self) -> Mapping[str, DataConfig]:
        return {self.path_of(name): self._completed(part) for name, part in self.parts.items()}

    def path_of(self, task: str) -> str:
        return f"data.parts.{task}"

    def load(self, task: Task, seed: int, num_clients: int | None) -> Iterator[RawRows]:
        for name, part in self.parts.items():
            try:
                found = list(self._completed(part).load(task, seed, num_clients))
            except DataError as error:
                raise DataError(self._located(name, str(error))) from error
            clients = {raw.file for raw in found if raw.split == "train"}
            for raw in found:
                yield replace(
                    raw,
                    where=f"{name}: {raw.where}",
                    task=name,
                    file=f"{name}/{raw.file}" if len(clients) > 1 else name,
                    test_set=f"{name}/{raw.test_set}" if raw.test_set else "",
                )

    def _completed(self, part: DataConfig) -> DataConfig:
        """Return a part with the fields that it takes from this section."""
        given = part.model_fields_set
        taken = {*SHARED, *(field for field in COLUMNS if field not in given)}
        if part.format is None:
            taken |= {field for field in TEMPLATES if field not in given}
        if not given & {*TEMPLATES, "format"}:
            taken.add("format")
        return part.model_copy(update={field: getattr(self, field) for field in taken})

    def _located(self, name: str, message: str) -> str:
        """Return a part's message with the place of its setting in the whole configuration."""
        path, colon, rest = message.partition(":")
        section, _, field = path.partition(".")
        if colon and section == "data" and field.partition(".")[0] in type(self.parts[name]).model_fields:
            return f"{self.path_of(name)}.{field}:{rest}"
        return f"{self.path_of(name)}: {message}"


ENTRY = Several
