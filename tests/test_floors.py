"""The order of the packages: a file imports from its own package and those below it, and few files import the
heavy libraries. Read from the syntax tree, so nothing is imported, and imports inside functions count too.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fedray"

ORDER = (
    # From the ground up. Names without a folder are files at the top; `fedray` itself is the package's __init__.
    {"types", "errors", "randomness"},
    {"config"},
    {"aggregation"},
    {"models"},
    {"data"},
    {"evaluation"},
    {"adapters"},
    {"training"},
    {"methods"},
    {"storage"},
    {"federation"},
    {"planning"},
    {"results"},
    {"experiment"},
    {"runtime"},
    {"sweeps"},
    {"api", "fedray"},
    {"cli", "__main__"},
)
ONLY_IN = {"ray": ("runtime/", "sweeps/", "cli/jobs_api.py"), "deepspeed": ("training/deepspeed_engine.py",)}
"""Where a library may be imported: folders, or files."""
NEVER_AT_MODULE_TOP = {"pyreft", "deepspeed"}  # seconds of import that only their users should pay
MOVING = {"api"}
"""Modules that have no package yet; nothing is checked of what they import and of who imports them."""


@dataclass(frozen=True)
class Import:
    """module: dotted name of what is imported. runs_at_import: whether importing the file runs this import."""

    module: str
    line: int
    runs_at_import: bool


def imports_of(source: str, package: tuple[str, ...], modules: set[str]) -> Iterator[Import]:
    """Yield every import in a file.

    package: the package that the file is in, which relative imports start from.
    modules: dotted names of fedray's modules: they tell `from fedray import config` (a module) from a function.
    """
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while waiting:
        node, runs = waiting.pop()
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            members = [f"{base}.{alias.name}" for alias in node.names]
            names = [member if member in modules else base for member in members]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in dict.fromkeys(names):
            yield Import(name, node.lineno, runs)

        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += [(child, False) for child in node.body] + [(child, runs) for child in node.orelse]
        else:
            waiting += [(child, runs and not inside_function) for child in ast.iter_child_nodes(node)]


def floor_of(module: str) -> int | None:
    """Return the floor of a module of fedray, or None if the table lacks it."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else parts[0]
    return next((height for height, names in enumerate(ORDER) if name in names), None)


def violations(files: dict[str, str]) -> list[str]:
    """Return what is wrong in files, given by path within fedray/, as `file:line: import: reason`."""
    modules = {
        ".".join(("fedray", *Path(path).with_suffix("").parts)).removesuffix(".__init__"): path for path in files
    }
    modules |= {"fedray": "__init__.py"}
    found = []
    for module, path in sorted(modules.items()):
        own = floor_of(module)
        if module.removeprefix("fedray.") in MOVING:
            continue
        if own is None:
            found.append(f"fedray/{path}: stands on no floor; add it to ORDER in tests/test_floors.py")
            continue
        package = ("fedray", *Path(path).parent.parts)
        for entry in imports_of(files.get(path, ""), package, set(modules)):
            where = f"fedray/{path}:{entry.line}: imports {entry.module}"
            top = entry.module.split(".")[0]
            if top == "fedray":
                height = floor_of(entry.module)
                if entry.module.removeprefix("fedray.") in MOVING:
                    continue
                if height is None:
                    found.append(f"{where}: which stands on no floor")
                elif height > own:
                    found.append(f"{where}: from floor {own} up to floor {height}")
            if top in ONLY_IN and not path.startswith(ONLY_IN[top]):
                found.append(f"{where}: only {', '.join(ONLY_IN[top])} may")
            if top in NEVER_AT_MODULE_TOP and entry.runs_at_import:
                found.append(f"{where}: import it inside the function that needs it")
    return found


def test_fedray_keeps_the_order_of_its_packages() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(files) > 10, f"{PACKAGE} holds only {sorted(files)}"
    found = violations(files)
    assert not found, "\n".join(["the order is:", *(f"{i} {sorted(names)}" for i, names in enumerate(ORDER)), *found])


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (
            "methods/mine.py",
            "import numpy\n\nfrom fedray.runtime.driver import Driver",
            ["fedray/methods/mine.py:3: imports fedray.runtime.driver: from floor 8 up to floor 14"],
        ),
        (
            "methods/mine.py",
            "def f():\n    from fedray.runtime import driver",
            ["fedray/methods/mine.py:2: imports fedray.runtime.driver: from floor 8 up to floor 14"],
        ),
        (
            "methods/mine.py",
            "from ..runtime import driver",
            ["fedray/methods/mine.py:1: imports fedray.runtime.driver: from floor 8 up to floor 14"],
        ),
        (
            "evaluation/losses.py",
            "import fedray.adapters.layout as l",
            ["fedray/evaluation/losses.py:1: imports fedray.adapters.layout: from floor 5 up to floor 6"],
        ),
        ("errors.py", "from fedray import run", ["fedray/errors.py:1: imports fedray: from floor 0 up to floor 16"]),
        (
            "methods/mine.py",
            "from importlib import import_module\nimport_module('fedray.runtime.driver')",
            ["fedray/methods/mine.py:2: imports fedray.runtime.driver: from floor 8 up to floor 14"],
        ),
        (
            "federation/worker.py",
            "def f():\n    import ray.util.state",
            ["fedray/federation/worker.py:2: imports ray.util.state: only runtime/, sweeps/, cli/jobs_api.py may"],
        ),
        (
            "training/loop.py",
            "def f():\n    from deepspeed import zero",
            ["fedray/training/loop.py:2: imports deepspeed: only training/deepspeed_engine.py may"],
        ),
        (
            "training/deepspeed_engine.py",
            "try:\n    import deepspeed\nexcept ImportError:\n    pass",
            ["fedray/training/deepspeed_engine.py:2: imports deepspeed: import it inside the function that needs it"],
        ),
        (
            "adapters/reft.py",
            "class A:\n    from pyreft.interventions import LoreftIntervention",
            ["fedray/adapters/reft.py:2: imports pyreft.interventions: import it inside the function that needs it"],
        ),
        ("helpers.py", "", ["fedray/helpers.py: stands on no floor; add it to ORDER in tests/test_floors.py"]),
    ],
)
def test_a_violation_is_found(path: str, source: str, expected: list[str]) -> None:
    assert violations({"runtime/driver.py": "", "adapters/layout.py": "", path: source}) == expected


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/driver.py", "import ray\nfrom fedray import methods\nfrom fedray.runtime.pool import ClientPool"),
        ("methods/mine.py", "from .parts import heads\nfrom fedray.adapters.layout import Layout\nimport rayleigh"),
        ("training/deepspeed_engine.py", "def f():\n    import deepspeed"),
        ("adapters/reft.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyreft"),
        ("adapters/reft.py", "async def f():\n    import pyreft"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    known = {"runtime/pool.py": "", "methods/__init__.py": "", "methods/parts/heads.py": "", "adapters/layout.py": ""}
    assert violations(known | {path: source}) == []
