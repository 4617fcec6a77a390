"""Sections of a configuration: frozen, without unknown keys, and with clear messages about mistakes."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from fedray.errors import choices, nearest

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]


def absolute(path: str, folder: Path) -> str:
    """Return a relative path as one below the folder; absolute paths and URIs as they are."""
    return path if "://" in path else str(folder / Path(path).expanduser())


class Section(BaseModel):
    """Frozen, no unknown keys; attribute docstrings are the fields' documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads `true` as 1; a rank of `true` is a mistake, not a one. `false` is `off` where that is allowed,
        because YAML reads the bare word as false."""
        if value is False and "off" in _options(cls.model_fields[info.field_name or ""].annotation):
            return "off"
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(entry, bool) for entry in given):
            assert info.field_name is not None
            if _holds_numbers(cls.model_fields[info.field_name].annotation):
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


class Mistakes(ValueError):
    """The mistakes of a section that was checked by itself, one line each, for the section around it."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("; ".join(self.lines))


def describe(error: ValidationError, root: type[BaseModel], field: str | None = None) -> Iterator[str]:
    """Return one line per mistake in a `root`, or in one of its fields alone: where, what came, what is allowed, the
    nearest valid name."""
    for entry in error.errors():
        if field is not None and entry["loc"][:1] != (field,):
            continue
        where = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            *parents, key = entry["loc"]
            known = _fields_at(root, [str(part) for part in parents])
            yield f"{where}: unknown key{nearest(str(key), known)}; allowed: {choices(known)}"
        elif entry["type"] == "missing":
            yield f"{where}: missing"
        elif entry["type"] == "value_error" and isinstance(entry["ctx"]["error"], Mistakes):
            yield from (f"{where}.{line}" for line in entry["ctx"]["error"].lines)
        elif entry["type"] == "value_error":
            yield f"{where}: {entry['ctx']['error']}" if where else str(entry["ctx"]["error"])
        else:
            came = entry["input"]
            hint = nearest(came, re.findall(r"'([^']*)'", entry["msg"])) if isinstance(came, str) else ""
            yield f"{where}: got {came!r}: {entry['msg']}{hint}"


def _options(annotation: Any) -> set[Any]:
    """Return the values of a field that are written out in its type."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(_options, get_args(annotation)))


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
