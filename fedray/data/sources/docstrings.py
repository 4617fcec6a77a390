"""`docstrings`: docstrings of installed libraries, real English that every installation has.

The task is to infer from the prose what is documented: a class, a function, a method or a module. Every library is a
natural client. Source files are parsed, never imported. Signatures, parameter sections and doctests are left out, and
so is the object's name. A library's files are read in the order of a hash of their path, until there are enough
docstrings of every kind.
"""

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedray.config import DataConfig, RawRows
from fedray.config.section import PositiveInt
from fedray.errors import DataError, nearest
from fedray.models.cache import replacing
from fedray.models.paths import find_package, installed_packages
from fedray.types import Task

KINDS = ("class", "function", "method", "module")
STDLIB = "stdlib"
MIN_CHARACTERS = 20
MAX_CHARACTERS = 400
DEFAULT_LIBRARIES = 12
BYTES_PER_EXAMPLE = 40_000
"""Some libraries hardly document their modules: reading stops after this much source per wanted example."""
LARGE_FILE = 60_000
FORMAT = "1"
"""Changes whenever the same source would give other texts."""
SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "test",
        "tests",
        "testing",
        "_vendor",
        "vendor",
        "vendored",
        "third_party",
        "thirdparty",
        "thirdparty_files",
        "externals",
        "site-packages",
        "dist-packages",
        "lib2to3",
        "idlelib",
        "turtledemo",
    )
)
_SECTION = re.compile(
    r"^\s*(args?|arguments?|parameters?|params|returns?|raises|yields?|examples?|notes?|attributes|see also|references|"
    r"usage|warnings?|keyword args|other parameters|methods|todo)\s*:?\s*$|^\s*(:\w+|@\w+|\.\. )|^\s*([-=~^*`#])\3{2,}",
    re.IGNORECASE,
)
_SIGNATURE = re.compile(r"^\s*[\w.]+\(.*\)(\s*->.*)?$")


class Docstrings(DataConfig):
    """Every library is a natural client and a task."""

    libraries: tuple[str, ...] = ()
    """Import names of installed libraries, `stdlib` for the standard library. Default: those with most source."""
    max_per_client: PositiveInt | None = 200
    """Keep at most this many examples per library, balanced over kinds as far as they exist; null: all."""

    def load(self, task: Task, seed: int, num_clients: int | None) -> list[RawRows]:
        return read_docstrings(self.libraries, self.max_per_client, Path(self.cache_dir).expanduser())


def read_docstrings(libraries: Sequence[str], max_per_library: int | None, cache_dir: Path) -> list[RawRows]:
    """Return the rows of every library: text, label and kind (the same), library. No text occurs twice.

    Args:
        libraries: import names, or `stdlib`; none given: the installed ones with most Python source.
        max_per_library: most rows of a library; None: all.
        cache_dir: what was read is kept there until a source file changes.

    Raises:
        DataError: a library is not installed, has no Python source, or is named twice.
    """
    names = list(libraries) or _largest()
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data.libraries: {name!r} occurs {names.count(name)} times")
    seen: set[str] = set()
    found = []
    for name in names:
        examples = [(text, kind) for text, kind in _kept(name, max_per_library, cache_dir) if text not in seen]
        seen.update(text for text, _ in examples)
        texts, kinds = [text for text, _ in examples], [kind for _, kind in examples]
        columns = {"text": texts, "label": kinds, "kind": kinds, "library": [name] * len(texts)}
        found.append(RawRows(f"docstrings of {name}", columns, "train", name, name, unit="docstring"))
    return found


def _kept(name: str, limit: int | None, cache_dir: Path) -> list[tuple[str, str]]:
    """Return a library's (text, kind), from the cache if its source files are still the same."""
    files = _source_files(name)
    state = [FORMAT, sys.version, limit, *((path, info.st_size, info.st_mtime_ns) for path, info in files.items())]
    path = cache_dir / "docstrings" / f"{hashlib.sha256(repr(state).encode()).hexdigest()}.json"
    try:
        return [(str(text), str(kind)) for text, kind in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        examples = _balanced(files, limit)
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(examples), encoding="utf-8")
    return examples


def _balanced(files: Iterable[str], limit: int | None) -> list[tuple[str, str]]:
    """Return (text, kind) from the files, as evenly over the kinds as they exist."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    seen: set[str] = set()
    read = 0
    for path in files:
        counts = [len(texts) for texts in found.values()]
        even = limit is not None and min(counts) * len(KINDS) >= limit
        if even or (limit is not None and sum(counts) >= limit and read > limit * BYTES_PER_EXAMPLE):
            break
        source = _read_source(path)
        read += len(source)
        for kind, docstring in _docstrings(source):
            text = prose(docstring)
            if len(text) >= MIN_CHARACTERS and text not in seen:
                seen.add(text)
                found[kind].append(text)
    quotas = _quotas({kind: len(texts) for kind, texts in found.items()}, limit)
    return [(text, kind) for kind in KINDS for text in found[kind][: quotas[kind]]]


def _quotas(available: dict[str, int], limit: int | None) -> dict[str, int]:
    """Return how many of each kind to keep: equal shares, what a rare kind cannot fill going to the others."""
    if limit is None:
        return available
    quotas = {}
    for position, kind in enumerate(sorted(available, key=lambda kind: (available[kind], kind))):
        quotas[kind] = min(available[kind], limit // (len(available) - position))
        limit -= quotas[kind]
    return quotas


def prose(docstring: str) -> str:
    """Return the running text of a docstring on one line: its first paragraphs, without code and sections.

    A paragraph that would lead beyond 400 characters is left out, or cut after a word if it is the first.
    """
    kept = ""
    docstring = docstring.encode("utf-8", "ignore").decode()  # escapes may spell half a surrogate pair
    for paragraph in _paragraphs(inspect.cleandoc(docstring).splitlines()):
        text = " ".join(paragraph.split())
        if not kept:
            kept = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]
        elif len(kept) + 1 + len(text) <= MAX_CHARACTERS:
            kept += " " + text
        else:
            break
    return kept


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Yield paragraphs of unindented lines up to the first section; doctests and what they print are left out."""
    paragraph: list[str] = []
    doctest = False
    for line in [*lines, ""]:
        doctest = line.lstrip().startswith((">>>", "...")) or (doctest and bool(line.strip()))
        if _SECTION.match(line):
            # An underline makes the line above it a heading, not prose.
            paragraph = paragraph[:-1] if line.strip()[:1] in set("-=~^*`#") else paragraph
            break
        if not line.strip() and paragraph:
            yield " ".join(paragraph)
            paragraph = []
        elif line.strip() and not doctest and not line.startswith((" ", "\t")) and not _SIGNATURE.match(line):
            paragraph.append(line)
    if paragraph:
        yield " ".join(paragraph)


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, docstring) of a module's source; nothing from source that Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from _documented(tree, "module", "function")


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, kind: str, function: str
) -> Iterator[tuple[str, str]]:
    """Yield the docstring of a node and of what it defines; `function` is the kind of functions directly in it."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield kind, docstring
    for child in node.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ():
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, "class", "method")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, function, function)


def _read_source(path: str) -> str:
    """Return a file's text in its declared encoding; nothing if it has another one, or no docstring for certain."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError, LookupError):
        return ""
    return source if '"""' in source or "'''" in source else ""


def _source_files(name: str) -> dict[str, os.stat_result]:
    """Return a library's source files: large ones last, otherwise in the order of a hash of their path within it."""
    ranked = []
    for root in _roots(name):
        for relative, path in _walk(root):
            info = os.stat(path)
            ranked.append((info.st_size > LARGE_FILE, hashlib.sha256(relative.encode()).digest(), path, info))
    if not ranked:
        raise DataError(f"data.libraries: {name!r} is installed without Python source; name another library")
    return {path: info for _, _, path, info in sorted(ranked, key=lambda entry: entry[:3])}


def _roots(name: str) -> list[str]:
    """Return the location of a library: its folders, or its one file."""
    if name == STDLIB:
        return [sysconfig.get_path("stdlib")]
    spec = find_package(name)
    if spec is None:
        known = [STDLIB, *installed_packages()]
        raise DataError(
            f"data.libraries: no library {name!r} is installed here{nearest(name, known)}; "
            "give import names, for example torch, or `stdlib`"
        )
    # An imported module may have changed its own search locations; some put Paths there.
    return [os.fspath(place) for place in spec.submodule_search_locations or [spec.origin or ""]]


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """Yield (relative path, path) of the Python files of a library, without tests and vendored copies."""
    if root.endswith(".py"):
        yield os.path.basename(root), root
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        for name in files:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                yield path[len(root) + 1 :].replace(os.sep, "/"), path


def _largest() -> list[str]:
    """Return the installed packages with most Python source, which are by and large those with most docstrings."""
    sizes = {}
    for name in installed_packages():
        spec = find_package(name)
        if spec is not None and spec.submodule_search_locations:
            sizes[name] = sum(os.stat(path).st_size for root in _roots(name) for _, path in _walk(root))
    return sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[:DEFAULT_LIBRARIES])


ENTRY = Docstrings
