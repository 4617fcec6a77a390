"""Extension points: entries are found by name (one file per entry) or by a user's class.

A registry names a package. Every module in it is an entry: the module `data.sources.files` is the source `files`, and
its attribute `ENTRY` is the class. So a new entry is a new file, and nothing is imported before it is asked for. A
user's own class is named by `class: module.Class`, from any module that can be imported, the current folder included.
"""

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from fedray.config.section import Mistakes, Section, describe
from fedray.errors import choices, nearest

Entry = TypeVar("Entry")

OPTION = "name"
"""Key of entries that are the value of one field of a section. Other keys are fields of a section that is itself an
entry, and messages name those."""


class Registry(Generic[Entry]):
    """The entries of one kind.

    Args:
        kind: what an entry is called in messages, for example `data source`.
        package: dotted name of the package whose modules are the entries.
        base: class that every entry derives from.
        key: field of the configuration that holds the entry's name.
        others: modules of the package that are no entries.
        default: name of the entry where the configuration gives neither a name nor a class.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        base: type[Entry],
        key: str = "name",
        others: Collection[str] = (),
        default: str | None = None,
    ):
        self.kind, self.package, self.base, self.key = kind, package, base, key
        self._others, self._default = frozenset(others), default

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The built-in entries, sorted."""
        folder = importlib.import_module(self.package).__path__
        return tuple(sorted({module.name for module in pkgutil.iter_modules(folder)} - self._others))

    def find(self, name: str) -> type[Entry]:
        """Return the class of a built-in entry.

        Raises:
            ValueError: there is no such entry; the message lists those that there are.
        """
        if name not in self.names:
            raise ValueError(f"unknown {self.kind} {name!r}{nearest(name, self.names)}; allowed: {choices(self.names)}")
        entry: type[Entry] = importlib.import_module(f"{self.package}.{name}").ENTRY
        return entry

    def find_class(self, path: str) -> type[Entry]:
        """Return a user's own class, given as `module.Class`.

        Raises:
            ValueError: it cannot be imported, is not derived from the kind's base class, or lacks one of its methods.
        """
        cls = import_class(path)
        base = f"{self.base.__module__}.{self.base.__qualname__}"
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{path} must be a class derived from {base}")
        if inspect.isabstract(cls):
            raise ValueError(f"{path} must have the methods of {base}; missing: {choices(sorted(_abstract(cls)))}")
        return cls

    def select(self, value: Any) -> type[Entry]:
        """Return the class that a section of the configuration names: a mapping with the registry's `key`, or with
        `class`. Without either, the base class, whose own validation says what is missing.

        Raises:
            ValueError: as `find` and `find_class`, or both a name and a class are given.
        """
        name, path = value.get(self.key), value.get("class") or value.get("class_")
        if name is not None and path is not None:
            raise ValueError(f"expected either `{self.key}` (built in) or `class` (module.Class of your own), got both")
        if path is not None:
            return self.find_class(str(path))
        name = self._default if name is None else name
        return self.base if name is None else self.find(str(name))

    def named(self, cls: type[Any], fields: Any) -> Any:
        """Return the fields of a section of class `cls` with the name, or the `class`, by which `select` finds it: for
        sections that are made in Python."""
        if not isinstance(fields, Mapping) or any(fields.get(key) for key in (self.key, "class", "class_")):
            return fields
        package, _, module = cls.__module__.rpartition(".")
        built_in = package == self.package
        return {**fields, **({self.key: module} if built_in else {"class": f"{cls.__module__}.{cls.__qualname__}"})}

    def parse(self, value: Any) -> Any:
        """Return the checked section that a value of the configuration describes: a mapping as for `select`, the name
        of an entry without further fields, or a section, which is returned as it is.

        Fields that belong to other built-in entries are checked and left out, so that one file serves all of them.

        Raises:
            Mistakes: a field is unknown, missing, or out of range.
            ValueError: as `select`; or the fields contradict each other.
        """
        if isinstance(value, str):
            value = {self.key: value}
        if isinstance(value, Section) or not isinstance(value, Mapping):
            return value
        cls = self._selected(value)
        own = _field_names(cls)
        selectors = {self.key, "class"} - own
        given = {str(name): entry for name, entry in value.items() if name not in selectors}
        mistakes: list[str] = []
        if rest := [name for name in given if name not in own]:
            entries = [self.find(name) for name in self.names]
            foreign = set().union(*map(_field_names, entries)) - own
            for name in rest:
                if name in foreign:
                    mistakes += _mistakes(name, given[name], [cls for cls in entries if name in _field_names(cls)])
                else:
                    mistakes.append(self._unknown(name, cls, foreign))
        try:
            section = cls.model_validate({name: entry for name, entry in given.items() if name in own})
        except ValidationError as error:
            if self.key == OPTION and not mistakes and not any(entry["loc"] for entry in error.errors()):
                raise ValueError("; ".join(describe(error, cls))) from None
            mistakes = [*describe(error, cls), *mistakes]
        if mistakes:
            raise Mistakes(mistakes)
        return section

    def _selected(self, value: Mapping[str, Any]) -> Any:
        """Return the class as `select`.

        Raises:
            Mistakes: there is none; the message begins with the field to change.
        """
        field = "class" if value.get("class") or value.get("class_") else self.key
        try:
            cls = self.select(value)
        except ValueError as error:
            if self.key == OPTION:
                raise
            raise Mistakes([f"{field}: {error}"]) from error
        if cls is self.base and inspect.isabstract(cls):
            own = "or give the `class` (module.Class) of your own"
            raise Mistakes([f"{field}: missing; allowed: {choices(self.names)}, {own}"])
        return cls

    def _unknown(self, name: str, cls: Any, foreign: Collection[str]) -> str:
        """Return what a message says about an unknown field."""
        own = sorted(field.alias or name for name, field in cls.model_fields.items())
        others = f"; with another `{self.key}`: {choices(sorted(foreign))}" if foreign else ""
        return f"{name}: unknown key{nearest(name, [*own, *sorted(foreign)])}; allowed: {choices(own)}{others}"


def _mistakes(name: str, value: Any, entries: Iterable[Any]) -> list[str]:
    """Return what is wrong with the value of one field; nothing if it is right for one of the entries."""
    found: list[str] = []
    for cls in entries:
        try:
            cls.model_validate({name: value})
            return []
        except ValidationError as error:
            mistakes = list(describe(error, cls, field=name))
        if not mistakes:  # it is other fields that are missing
            return []
        found = found or mistakes
    return found


def _field_names(cls: Any) -> set[str]:
    """Return a section's fields by name and by alias."""
    fields = cls.model_fields.items()
    return {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}


def _abstract(cls: Any) -> set[str]:
    """Return the names of the methods that a class lacks."""
    return set(cls.__abstractmethods__)


_own_folders: list[str] = []


def own_folders() -> tuple[str, ...]:
    """Return the folders in which this process looks for users' own modules: its current ones, and those of the process
    that started the run."""
    return tuple(_own_folders)


def search_in(folders: Iterable[str]) -> None:
    """Look for users' own modules in these folders, too."""
    for folder in folders:
        if folder not in _own_folders:
            _own_folders.append(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def import_class(path: str) -> Any:
    """Return what `module.Class` names; modules are also found in the current folder, and in that of the process that
    started the run.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    search_in([os.getcwd()])  # a user's file beside the configuration, when started through the entry point
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's file raises while it runs
        raise ValueError(f"class {path!r} cannot be imported: {type(error).__name__}: {error}") from error
