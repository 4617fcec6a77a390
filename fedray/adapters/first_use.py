"""Modules that other packages import and fedray hardly needs, loaded when they are first used.

`importlib.util.LazyLoader` does not serve: in Python 3.11 a second `import` of a module that it has prepared loads it,
and so does everybody who looks through `sys.modules`, as torch does.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Prepared(ModuleType):
    """A module with its specification and without its contents."""

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet: load the module, in place."""
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


def forget_unused() -> None:
    """Remove modules that were prepared and not used, so that another one of the same name can be imported. Who has
    imported one keeps it."""
    for name in [name for name, module in sys.modules.items() if type(module) is _Prepared]:
        del sys.modules[name]


def load_on_first_use(*names: str) -> None:
    """Prepare modules, so that an import of them no longer loads them: they are loaded when an attribute is first asked
    for. `from name import x` asks for one. Modules that are loaded already, or are not installed, stay as they are."""
    for name in names:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
            module = importlib.util.module_from_spec(spec)
            module.__class__ = _Prepared
            vars(module).pop("__path__", None)  # an import of a module inside asks for it and so loads the package
            sys.modules[name] = module
