"""The order of the packages: a file imports from its own package and those below it in the picture of
docs/architecture.md, and few files import the heavy libraries. Read from the syntax tree, so nothing is imported, and
imports inside functions count too.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fedray"


def picture() -> list[set[str]]:
    """Return the names of the picture's lines from the ground up: packages, and files at the top without `.py`."""
    block = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("```")[1]
    lines = [line for line in block.splitlines() if line.startswith("  ")]
    return [set(re.findall(r"(\w+)(?:/|\.py)(?= |$)", re.split(r" {3,}", line.strip())[0])) for line in lines][::-1]


ORDER = picture()
next(names for names in ORDER if "api" in names).add("fedray")  # the package's own __init__.py
next(names for names in ORDER if "cli" in names).add("__main__")
ONLY_IN = {
    "ray": ("runtime/", "sweeps/", "cli/jobs_api.py"),
    "deepspeed": ("training/deepspeed_engine.py",),
    "bitsandbytes": ("models/quantised.py",),
    "lm_eval": ("evaluation/harness_model.py", "experiment/harness.py"),
}
"""Where a library may be imported: folders, or files."""
NEVER_AT_MODULE_TOP = {"pyreft", "deepspeed", "bitsandbytes"}  # seconds of import that only their users should pay


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
        if own is None:
            found.append(f"fedray/{path}: stands on no floor; add it to the picture in docs/architecture.md")
            continue
        package = ("fedray", *Path(path).parent.parts)
        for entry in imports_of(files.get(path, ""), package, set(modules)):
            where = f"fedray/{path}:{entry.line}: imports {entry.module}"
            top = entry.module.split(".")[0]
            if top == "fedray":
                height = floor_of(entry.module)
                if height is None:
                    found.append(f"{where}: which stands on no floor")
                elif height > own:
                    found.append(f"{where}: from floor {own} up to floor {height}")
            if top in ONLY_IN and not path.startswith(ONLY_IN[top]):
                found.append(f"{where}: only {', '.join(ONLY_IN[top])} may")
            if top in NEVER_AT_MODULE_TOP and entry.runs_at_import:
                found.append(f"{where}: import it inside the function that needs it")
    return found


def sources() -> dict[str, str]:
    """Return the text of every file of the package, by path within fedray/."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}


def test_the_picture_shows_what_is_there() -> None:
    there = {path.split("/")[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert set().union(*ORDER) - {"fedray"} == there
    assert sum(map(len, ORDER)) == len(there) + 1, "a name stands twice"


def packages() -> list[str]:
    return sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/**/__init__.py"))


@pytest.mark.parametrize("package", packages())
def test_a_package_says_what_it_uses(package: str) -> None:
    """The line `Uses: …` of its `__init__.py` names the packages that its files import. Every other package of fedray
    counts, but not what all share (types, errors, randomness), and a package's own parts only within it."""
    files = {path: text for path, text in sources().items() if path.startswith(f"{package}/")}
    modules = {"fedray." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in sources()}
    used = set()
    for path, text in files.items():
        for entry in imports_of(text, ("fedray", *Path(path).parent.parts), modules):
            if entry.module.startswith("fedray.") and not entry.module.startswith(
                f"fedray.{package.replace('/', '.')}."
            ):
                used.add(entry.module.split(".")[1])
    used -= ORDER[0] | {package}
    found = re.search(r"^Uses: ([^.]*)\.", files[f"{package}/__init__.py"], re.MULTILINE)
    assert found, f"{package}/__init__.py: has no line `Uses: …`"
    said = set() if found[1] == "no other package" else set(re.findall(r"\w+", found[1]))
    assert said == used, f"Uses: {', '.join(sorted(used))}."


def test_fedray_keeps_the_order_of_its_packages() -> None:
    files = sources()
    assert len(files) > 10, f"{PACKAGE} holds only {sorted(files)}"
    found = violations(files)
    assert not found, "\n".join(["the order is:", *(f"{i} {sorted(names)}" for i, names in enumerate(ORDER)), *found])


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (
            "methods/mine.py",
            "import numpy\n\nfrom fedray.runtime.driver import Driver",
            ["fedray/methods/mine.py:3: imports fedray.runtime.driver: from floor 8 up to floor 17"],
        ),
        (
            "methods/mine.py",
            "def f():\n    from fedray.runtime import driver",
            ["fedray/methods/mine.py:2: imports fedray.runtime.driver: from floor 8 up to floor 17"],
        ),
        (
            "methods/mine.py",
            "from ..runtime import driver",
            ["fedray/methods/mine.py:1: imports fedray.runtime.driver: from floor 8 up to floor 17"],
        ),
        (
            "evaluation/losses.py",
            "import fedray.adapters.layout as l",
            ["fedray/evaluation/losses.py:1: imports fedray.adapters.layout: from floor 5 up to floor 6"],
        ),
        ("errors.py", "from fedray import run", ["fedray/errors.py:1: imports fedray: from floor 0 up to floor 19"]),
        (
            "methods/mine.py",
            "from importlib import import_module\nimport_module('fedray.runtime.driver')",
            ["fedray/methods/mine.py:2: imports fedray.runtime.driver: from floor 8 up to floor 17"],
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
        ("helpers.py", "", ["fedray/helpers.py: stands on no floor; add it to the picture in docs/architecture.md"]),
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
