"""Options that a configuration gives by name, or by class with fields: metrics, rules, adapter kinds and engines."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from fedray.config.registry import Registry
from fedray.config.section import Section


class Option(Section):
    """A choice with fields of its own, such as `accuracy`, `{name: trimmed_mean, trim: 0.1}` or `{class: my.Rule}`.

    Attributes:
        name: what tables and messages call it; default the name of the class.
        must_define: functions of the kind's base class that every class of the kind replaces.
    """

    name: ClassVar[str] = ""
    must_define: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that could not be used.

        Raises:
            TypeError: it lacks a function of `must_define`.
        """
        super().__pydantic_init_subclass__(**kwargs)
        base = next(one for one in cls.__mro__ if Option in one.__bases__)
        for function in () if cls is base else cls.must_define:
            if getattr(cls, function) is getattr(base, function):
                raise TypeError(f"{cls.__name__}: has no function `{function}`")

    @classmethod
    def registry(cls) -> Registry[Any]:
        """Return the registry of the options of this kind."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What tables and messages call it."""
        return self.name or type(self).__name__

    @model_validator(mode="before")
    @classmethod
    def _only_fields(cls, value: Any) -> Any:
        """Drop the keys by which a registry has selected this class: they are no fields.

        Raises:
            ValueError: nothing has selected a class.
        """
        if cls is cls.registry().base:
            raise ValueError(f"expected `name` (built in) or `class` (module.Class of your own), got {value!r}")
        if isinstance(value, Mapping):
            return {key: entry for key, entry in value.items() if key not in ("name", "class")}
        return value

    @model_serializer(mode="wrap")
    def _as_selected(self, fields: SerializerFunctionWrapHandler) -> Any:
        """Return the value of the configuration that the registry reads back to an equal option: the name of a
        built-in one without fields, or a mapping with its name or class and all fields."""
        registry, module = self.registry(), type(self).__module__
        if module.rpartition(".")[0] != registry.package:
            return {"class": f"{module}.{type(self).__qualname__}", **fields(self)}
        entry = module.rpartition(".")[2]
        return {registry.key: entry, **fields(self)} if type(self).model_fields else entry

    def __reduce__(self) -> Any:
        """Pickle as a value of the configuration: another process imports a user's class by its path, too."""
        return self.registry().parse, (self.model_dump(mode="json"),)
