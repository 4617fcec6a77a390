"""Whatever comes from a stranger is read or refused with the documented error: no crash, no hang, nothing built that
was not asked for. 1,000 cases each; `make test-fuzz` tries 10,000 (`--fuzz-cases`).

Cases are good inputs with pieces overwritten, cut out, doubled and put in, and now and then noise alone.
"""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedray.config import CheckpointConfig, Config, load_config, parse_overrides, parse_yaml
from fedray.data.reading.readers import read_file
from fedray.errors import ConfigError, DataError, StateError
from fedray.results.run_result import read_summaries
from fedray.storage.checkpoints import Checkpoints, Progress, sealed_line
from fedray.storage.client_states import StateFiles
from fedray.storage.codec import pack, pack_small, read_pack, unpack_small
from fedray.storage.paths import StoragePath
from fedray.types import state_type

pytestmark = pytest.mark.timeout(3600)

Check = Callable[[Any], None]


@state_type("test_fuzz.Kept")
@dataclass(frozen=True)
class Kept:
    values: Any
    more: Any = None


def mutated(good: bytes, code: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
    """Return what the code, five bytes for an edit, makes of a good input; of less than an edit, the code itself."""
    blob = good if len(code) >= 5 else code
    for high, low, what, which, length in zip(*(code[start::5] for start in range(5)), strict=False):
        at = (256 * high + low) % (len(blob) + 1)
        noise = (code[which % len(code) :] + code)[: length % 13]
        piece = pieces[which % len(pieces)] if pieces and length < 128 else noise
        if what % 4 == 0:
            blob = blob[:at] + piece + blob[at:]
        elif what % 4 == 1:
            blob = blob[:at] + piece + blob[at + len(piece) :]
        elif what % 4 == 2:
            blob = blob[:at] + blob[at + length % 40 :]
        else:
            blob = blob[:at] + blob[max(0, at - 40) : at] * (length % 9) + blob[at:]
    return blob


@pytest.fixture
def fuzzed(pytestconfig: pytest.Config) -> Callable[[Any, Check], None]:
    """Run a check on so many cases of a strategy."""
    cases = pytestconfig.getoption("--fuzz-cases")

    def run(strategy: Any, check: Check, refused: type[Exception], named: str = "") -> None:
        """refused: what the check may raise. named: what its message then has."""

        @settings(
            max_examples=cases,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(strategy)
        def every(case: Any) -> None:
            told = named
            with suppress(refused):
                try:
                    check(case)
                except refused as error:
                    told = str(error)
                    raise
            assert named in told

        every()

    return run


def edits_of(good: bytes, pieces: tuple[bytes, ...] = ()) -> Any:
    """One draw for a case: drawing ten thousand takes seconds."""
    return st.binary(max_size=20).map(lambda code: mutated(good, code, pieces))


# ---------------------------------------------------------------- configuration

CONFIG = b"""\
rounds: 2
method: [fedalt, {name: fedavg, label: a, lora: {rank: 2}}]
model: {path: random, tokenizer: bytes, config: {model_type: bert}}
data: {source: synthetic, max_length: 32}
partition: {kind: dirichlet, alpha: 0.5}
clients: {count: 4, tiers: {x: {share: 0.5}, y: {share: 0.5, up_mbps: 1e1}}}
train: {lr: 5e-3}
"""
YAML_PIECES = (b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system [id]", b"{", b"}", b"[", b": ", b"\n- ",
               b".inf", b".nan", b"-1", b"1e999", b"null", b"true", b"'", b'"', b"9" * 30, b"? ", b"!!binary aGk=",
               b"2001-01-01", b"rounds: ", b"..", b"\t")  # fmt: skip


def test_configurations(fuzzed: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    def check(blob: bytes) -> None:
        path.write_bytes(blob)
        assert isinstance(load_config(path), Config)

    fuzzed(edits_of(CONFIG, YAML_PIECES), check, ConfigError, str(path))


def test_overrides(fuzzed: Any) -> None:
    raw = parse_yaml(CONFIG.decode(), "file")
    paths = (
        "rounds",
        "train.lr",
        "method.0",
        "method.0.name",
        "clients.tiers.x.share",
        "clients",
        "",
        "a.b",
        "method.9.x",
    )
    entry = st.tuples(st.sampled_from(paths), st.text(max_size=12)).map("=".join)

    def check(arguments: list[str]) -> None:
        load_config(raw, parse_overrides(arguments))

    fuzzed(st.lists(st.one_of(entry, st.text(max_size=10)), max_size=2), check, ConfigError)


# ---------------------------------------------------------------- data

TEXT_FILES = {
    ".csv": b'text,label,who\n"a, b",1,x\n"line\nbreak",0,y\nplain,1,"q""q"\n',
    ".tsv": b'text\tlabel\n"a"\t1\n"b\nc"\t"x"\nplain "q\t1\n',
    ".jsonl": b'{"text": "a", "label": 1}\n{"text": "b\\u2028", "label": null, "more": [1, {"x": 1.5}]}\n',
    ".json": b'[{"text": "a", "label": 1},\n {"text": "b", "label": "x"}]',
    ".clients.json": b'{"Ann": [{"text": "a", "label": 1}],\n "Bob": [{"text": "b", "label": "x"}, {"text": "c"}]}',
}
DATA_PIECES = (b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 2000, b"{", b"}",
               b"]", b"9" * 5000, b"1e400", b"NaN", b"null", b"\\ud800", b'{"text": {"a": []}}')  # fmt: skip


@pytest.mark.parametrize("suffix", TEXT_FILES)
def test_text_files(fuzzed: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"

    def check(blob: bytes) -> None:
        path.write_bytes(blob)
        for block in read_file(path, "train", "file", "task"):
            assert all(len(values) == len(block) for values in block.columns.values())

    fuzzed(edits_of(TEXT_FILES[suffix], DATA_PIECES), check, DataError, str(path))


def test_parquet_files(fuzzed: Any, tmp_path: Path) -> None:
    path, buffer = tmp_path / "file.parquet", io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b", None], "label": [1, 2, 3], "list": [[1], [], None]}), buffer)

    def check(blob: bytes) -> None:
        path.write_bytes(blob)
        read_file(path, "train", "file", "task")

    fuzzed(edits_of(buffer.getvalue()), check, DataError, str(path))


# ---------------------------------------------------------------- states and checkpoints

STATE = {"a": [Kept(np.arange(4, dtype=np.float32)), None, 1.5], "b": (True, "x", np.zeros((0, 3)))}
STATE_PIECES = (b'"class"', b'"array"', b'"map"', b'"empty"', b"[", b"]", b'"os.system"', b"-1", b"99", b'"<f8"', b"{}")


def same_kind(value: Any) -> None:
    """Nothing else than states are made of."""
    if isinstance(value, dict):
        for entry in value.values():
            same_kind(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            same_kind(entry)
    else:
        assert value is None or isinstance(value, Kept | np.ndarray | bool | int | float | str)


def test_states(fuzzed: Any) -> None:
    def check(blob: bytes) -> None:
        same_kind(read_pack(blob).state(0))

    fuzzed(edits_of(pack([STATE]), STATE_PIECES), check, StateError)


def test_states_as_text(fuzzed: Any) -> None:
    good = pack_small({"a": [Kept(1), None], "b": (True, np.zeros((0, 3)))})
    assert good is not None

    def check(blob: bytes) -> None:
        same_kind(unpack_small(blob.decode("utf-8", "replace")))

    fuzzed(edits_of(good.encode(), STATE_PIECES), check, StateError)


@pytest.fixture
def run(tmp_path: Path) -> tuple[StoragePath, Path]:
    """A run with one checkpoint; its manifest."""
    place = StoragePath.of(tmp_path)
    (place / "states" / "m").make_folder()
    refs = StateFiles(place / "states" / "m", durable=False).write(0, [Kept(np.ones(3))])
    progress = Progress(1, Kept(np.ones(2)), {"c": refs[0], "d": refs[0]}, {"n": 1}, 0.5, 0.25, "d")
    Checkpoints(place, "m", CheckpointConfig()).save(progress)
    return place, tmp_path / "checkpoints" / "m" / "00001" / "manifest.json"


MANIFEST_PIECES = (
    b"null",
    b"-1",
    b"1e999",
    b'"../../x"',
    b"[]",
    b"{}",
    b'"',
    b",",
    b"9" * 400,
    b"\\ud800",
    b"NaN",
    b":",
)


def test_checkpoints(fuzzed: Any, run: tuple[StoragePath, Path]) -> None:
    """A stranger's manifest: its checksum fits what it says."""
    place, manifest = run
    good = manifest.read_bytes().splitlines()[0]
    (states,) = (manifest.parents[3] / "states" / "m").iterdir()
    kept = states.read_bytes()

    def check(blob: bytes) -> None:
        states.write_bytes(kept)  # a manifest that names none lets it go
        manifest.write_bytes(sealed_line(blob.replace(b"\n", b" ")))
        found, _ = Checkpoints(place, "m", CheckpointConfig()).newest()
        assert found is not None
        assert found.server_round == 1
        assert all(ref.text or ref.file == states.name for ref in found.client_states.values())

    fuzzed(edits_of(good, MANIFEST_PIECES), check, StateError, "no checkpoint is intact")


def test_summaries(fuzzed: Any, tmp_path: Path) -> None:
    good = json.dumps([{"method": "m", "rounds": 1}]).encode()
    path = tmp_path / "summary.json"

    def check(blob: bytes) -> None:
        path.write_bytes(blob)
        read_summaries(StoragePath.of(tmp_path))

    fuzzed(edits_of(good, MANIFEST_PIECES), check, StateError, str(path))
