"""Modules that are loaded on first use, and what a process therefore does without."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_experiment

from fedray.adapters.first_use import load_on_first_use


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `heavy_one` with a module `inside`; both write down when they are loaded."""
    folder = tmp_path / "heavy_one"
    folder.mkdir()
    note = f"open({str(tmp_path / 'log')!r}, 'a').write(__name__ + ' ')\n"
    (folder / "__init__.py").write_text(f"{note}number = 7\n")
    (folder / "inside.py").write_text(f"{note}from heavy_one import number\n")
    (tmp_path / "log").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "log"
    for name in ("heavy_one", "heavy_one.inside"):
        sys.modules.pop(name, None)


def test_a_module_is_loaded_when_it_is_used(package: Path) -> None:
    load_on_first_use("heavy_one")
    import heavy_one  # type: ignore[import-not-found]

    assert importlib.import_module("heavy_one") is heavy_one
    inspect.getmodule(inspect.currentframe())  # looks at the file of every module
    assert package.read_text() == ""
    assert heavy_one.number == 7
    assert type(heavy_one) is type(sys)
    assert package.read_text() == "heavy_one "
    with pytest.raises(AttributeError, match="nothing"):
        _ = heavy_one.nothing


@pytest.mark.parametrize("line", ["import heavy_one.inside", "from heavy_one.inside import number"])
def test_a_module_inside_comes_after_its_package(package: Path, line: str) -> None:
    load_on_first_use("heavy_one")
    exec(line)
    assert package.read_text() == "heavy_one heavy_one.inside "


def test_what_is_loaded_or_missing_stays_as_it_is(package: Path) -> None:
    import heavy_one

    load_on_first_use("heavy_one", "not_installed_anywhere")
    assert importlib.import_module("heavy_one") is heavy_one
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_installed_anywhere")
    assert package.read_text() == "heavy_one "


def loaded_by(program: str) -> set[str]:
    """Return the packages, with their contents, that a new process has loaded when the program ends."""
    told = "; print(*(n for n, m in sys.modules.items() if type(m) is type(sys)))"
    ended = subprocess.run([sys.executable, "-c", f"import sys; {program}{told}"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_help_needs_no_heavy_package() -> None:
    assert not loaded_by("import fedray.cli.app") & {"fedray.config", "numpy", "pydantic", "torch", "ray"}


def test_a_run_needs_no_plots(tmp_path: Path) -> None:
    fields = {**tiny_experiment(), "method": ["fedavg", "fedreft"], "rounds": 1, "runtime": "inline", "device": "cpu"}
    loaded = loaded_by(f"import fedray; fedray.run({fields!r}, output={str(tmp_path / 'run')!r})")
    assert {"fedray.api", "peft", "pyreft"} <= loaded
    assert not loaded & {"bitsandbytes", "evaluate", "matplotlib.pyplot"}
