"""Docstrings of a library written here, and of real ones; none is imported."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from fedray.data.sources import docstrings
from fedray.data.sources.docstrings import prose, read_docstrings
from fedray.errors import DataError

MODULE = '''"""What this module is all about, in a sentence."""
raise RuntimeError("imported")

class A:
    """A class whose description is long enough."""

    def method(self):
        """The method's own description, long enough."""

    async def short(self):
        """Too short."""

def function():
    """The function's description, long enough."""
    def inner():
        """An inner function, which is not read at all."""

def again():
    """The function's description, long enough."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a good module, and files that must not count or cannot be read."""
    root = tmp_path / "site" / "some_library"
    for folder in ("", "tests", "_vendor"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "good.py").write_text(MODULE)
    for name in ("tests/test_it.py", "_vendor/copy.py"):
        (root / name).write_text('"""A docstring that must not be read at all."""')
    (root / "bad_syntax.py").write_text('"""A docstring in a file that is not Python."""\nprint "2"')
    (root / "bad_encoding.py").write_bytes(b'"""A docstring in another encoding: \xe9\xff."""')
    (root / "declared.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""Le module d\xe9clar\xe9 en latin-1, lisible."""')
    monkeypatch.syspath_prepend(root.parent)
    return root


def read(names: list[str], limit: int | None, cache: Path) -> list[tuple[str, str, str]]:
    """Return (library, kind, text)."""
    columns = [raw.columns for raw in read_docstrings(names, limit, cache)]
    return [row for c in columns for row in zip(c["library"], c["kind"], c["text"], strict=True)]


def test_a_library_is_read_without_being_imported(library: Path, tmp_path: Path) -> None:
    assert sorted(read(["some_library"], None, tmp_path)) == [
        ("some_library", "class", "A class whose description is long enough."),
        ("some_library", "function", "The function's description, long enough."),
        ("some_library", "method", "The method's own description, long enough."),
        ("some_library", "module", "Le module déclaré en latin-1, lisible."),
        ("some_library", "module", "What this module is all about, in a sentence."),
    ]
    assert "some_library" not in sys.modules


def test_kinds_are_balanced_and_a_rare_kind_leaves_room_for_others(library: Path, tmp_path: Path) -> None:
    """8 wanted of 1 class, 1 function, 1 method and 10 modules: the modules fill up the 5 places that are left."""
    for number in range(8):
        (library / f"extra_{number}.py").write_text(f'"""Module number {number} of quite a few."""')
    kinds = [kind for _, kind, _ in read(["some_library"], 8, tmp_path)]
    assert kinds == ["class", "function", "method"] + ["module"] * 5


def test_a_text_of_two_libraries_counts_once_for_the_first(library: Path, tmp_path: Path) -> None:
    (library.parent / "single_file.py").write_text(MODULE.replace("A class whose", "Another class whose"))
    found = read(["some_library", "single_file"], None, tmp_path)
    assert len(found) == 6
    assert found[-1] == ("single_file", "class", "Another class whose description is long enough.")


def test_what_was_read_is_kept_until_a_file_changes(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(["some_library"], 4, tmp_path)
    parsed: list[str] = []
    real = docstrings._docstrings
    monkeypatch.setattr(docstrings, "_docstrings", lambda source: parsed.append(source) or real(source))
    assert read(["some_library"], 4, tmp_path) == first
    assert not parsed
    (kept,) = (tmp_path / "docstrings").iterdir()
    kept.write_text(kept.read_text()[:20])
    assert read(["some_library"], 4, tmp_path) == first
    assert parsed
    (library / "good.py").write_text(MODULE.replace("all about", "all about now"))
    assert any("about now" in text for _, _, text in read(["some_library"], None, tmp_path))


def test_real_libraries_give_what_is_asked_and_are_not_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    found = read(["pandas", "wsgiref", "stdlib"], 20, tmp_path)
    counts = Counter((library, kind) for library, kind, _ in found if library != "wsgiref")
    assert counts == {(library, kind): 5 for library in ("pandas", "stdlib") for kind in docstrings.KINDS}
    assert "wsgiref" in {library for library, _, _ in found}
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & {"pandas", "wsgiref"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["panda"], "no library 'panda' is installed here .did you mean 'pandas'"),
        (["stdlb"], "did you mean 'stdlib'"),
        (["sys"], "'sys' is installed without Python source"),
        (["os.path"], "no library 'os.path'"),
        (["json", "json"], "'json' occurs 2 times"),
    ],
)
def test_libraries_that_cannot_be_read_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_docstrings(names, 4, tmp_path)


def test_default_libraries_are_the_installed_ones_with_most_source(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("little", 100), ("much", 9000)):
        (library.parent / name).mkdir()
        (library.parent / name / "__init__.py").write_text(
            f'"""The library called {name}, with source."""' + " " * size
        )
    monkeypatch.setattr(docstrings, "installed_packages", lambda: ["little", "much", "some_library"])
    monkeypatch.setattr(docstrings, "DEFAULT_LIBRARIES", 2)
    assert [raw.file for raw in read_docstrings([], 4, tmp_path)] == ["much", "some_library"]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One\n    two.\n\n    Three.\n", "One two. Three."),
        ("Do it.\n\nParameters\n----------\nx : int", "Do it."),
        ("Do it.\n\nArgs:\n    x: what", "Do it."),
        ("Do it.\n\n:param x: what", "Do it."),
        ("Title\n=====\n\nBody text.", ""),
        ("Do it.\n\n>>> f(1)\n2\n\nMore.", "Do it. More."),
        ("f(x, y=None) -> int\n\nDo it.", "Do it."),
        ("Do it::\n\n    some code\n\nMore.", "Do it:: More."),
        ("a" * 390 + " bcdefg hijklmn", "a" * 390 + " bcdefg"),
        ("First.\n\n" + "a" * 400, "First."),
    ],
)
def test_prose_is_the_running_text_before_the_first_section(docstring: str, expected: str) -> None:
    assert prose(docstring) == expected
