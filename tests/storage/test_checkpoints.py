"""Checkpoints: whole or not there, the newest intact one found, nothing deleted that one of them needs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedray.config import CheckpointConfig
from fedray.errors import StateError
from fedray.storage.checkpoints import Checkpoints, Progress
from fedray.storage.client_states import StateFiles, StateRef
from fedray.storage.paths import StoragePath
from fedray.types import state_type


@state_type("test_checkpoint.Kept")
@dataclass(frozen=True)
class Kept:
    values: Any


class Run:
    """A method whose one client gets a new state of two numbers in every round."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.place = StoragePath.of(folder)
        (self.place / "states" / "m").make_folder()
        self.section = CheckpointConfig(**section)
        self.files = StateFiles(self.place / "states" / "m")
        self.checkpoints = self.opened()
        self.current: dict[str, StateRef] = {}

    def opened(self) -> Checkpoints:
        return Checkpoints(self.place, "m", self.section)

    def play(self, rounds: Sequence[int], scores: Sequence[float | None] = ()) -> None:
        """Rounds by their number; a checkpoint after each."""
        for number, server_round in enumerate(rounds):
            replaced = list(self.current.values())
            (self.current["c"],) = self.files.write(server_round, [Kept(np.full(2, server_round, np.float32))])
            progress = Progress(
                server_round=server_round + 1,
                server=Kept(np.full(3, server_round, np.float32)),
                client_states=dict(self.current),
                totals={"uplink_bytes": 2**60, "simulated_seconds": 0.5},
                seconds=1.5,
                score=scores[number] if scores else None,
                data_sha256="d",
            )
            self.files.forget(self.checkpoints.save(progress, replaced))

    def names(self) -> list[str]:
        return (self.place / "checkpoints" / "m").names()

    def states(self) -> list[int]:
        """Rounds of which states are there."""
        return [int(name[:5]) for name in (self.place / "states" / "m").names()]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.play(range(3))
    found, broken = run.opened().newest()
    assert found is not None
    assert broken == []
    assert found.server.values.tolist() == [2, 2, 2]
    (state,) = run.files.read([found.client_states["c"]])
    assert state.values.tolist() == [2, 2]
    assert (found.server_round, found.seconds, found.score, found.data_sha256) == (3, 1.5, None, "d")
    assert found.totals == {"uplink_bytes": 2**60, "simulated_seconds": 0.5}
    assert isinstance(found.totals["uplink_bytes"], int)


def test_nothing_there_is_nothing_to_continue(tmp_path: Path) -> None:
    assert Run(tmp_path).checkpoints.newest() == (None, [])


def test_the_last_ones_and_the_best_are_kept_with_their_states_and_no_others(tmp_path: Path) -> None:
    """Scores 1 5 2 3 1: the second is the best, the last two are 4 and 5."""
    run = Run(tmp_path, keep=2)
    run.play(range(5), [1, 5, 2, 3, 1])
    assert run.names() == ["00002", "00004", "00005"]
    assert run.states() == [1, 3, 4]
    lower = Run(tmp_path / "lower", keep=1)
    lower.checkpoints = Checkpoints(lower.place, "m", lower.section, higher=False)
    lower.play(range(3), [2, 1, 2])
    assert lower.names() == ["00002", "00003"]
    without = Run(tmp_path / "without", keep=1, best=False)
    without.play(range(3), [2, 1, 2])
    assert (without.names(), without.states()) == (["00003"], [2])


def test_of_a_finished_method_the_last_one_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.play(range(4), [9, 1, 1, 1])
    run.files.write(2, [Kept(np.zeros(2, np.float32))])  # by an actor that died before it told
    run.files.forget(run.checkpoints.finish())
    assert (run.names(), run.states()) == (["00004"], [3])


def test_who_continues_deletes_no_more_and_no_less(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    run.play(range(4), [9, 1, 1, 1])
    run.files.write(4, [Kept(np.zeros(2, np.float32))])  # of a round that did not end
    run.checkpoints = run.opened()
    run.checkpoints.newest()
    assert (run.names(), run.states()) == (["00001", "00003", "00004"], [0, 2, 3])
    run.play([4, 5], [1, 1])
    assert (run.names(), run.states()) == (["00001", "00005", "00006"], [0, 4, 5])


def test_every_nth_round_and_the_last(tmp_path: Path) -> None:
    checkpoints = Run(tmp_path, every=3).checkpoints
    assert [n for n in range(1, 9) if checkpoints.due(n, 8)] == [3, 6, 8]
    assert not any(Run(tmp_path, every=0).checkpoints.due(n, 8) for n in range(1, 9))


def files_of(run: Run, server_round: int) -> list[Path]:
    folder = run.place.local
    found = list((folder / "checkpoints" / "m" / f"{server_round:05d}").iterdir())
    return sorted([*found, *(folder / "states" / "m").glob(f"{server_round - 1:05d}-*")])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(which=st.integers(0, 2), data=st.data())
def test_a_flipped_bit_or_a_missing_end_is_seen_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, which: int, data: st.DataObject
) -> None:
    run = Run(tmp_path_factory.mktemp("run"))
    run.play(range(3))
    file = files_of(run, 3)[which]
    blob = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(blob) - 2))  # the last byte of the manifest is a line's end
    if data.draw(st.booleans()):
        blob[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del blob[place:]
    file.write_bytes(blob)
    found, broken = run.opened().newest()
    assert found is not None
    assert (found.server_round, found.server.values.tolist()) == (2, [1, 1, 1])
    assert len(broken) == 1
    assert "00003" in broken[0]
    assert run.names() == ["00002"]
    assert run.states() == [1]


@pytest.mark.parametrize("which", range(3))
def test_a_missing_file_is_seen(tmp_path: Path, which: int) -> None:
    """Without its manifest it never was one, and nothing is said."""
    run = Run(tmp_path)
    run.play(range(3))
    file = files_of(run, 3)[which]
    file.unlink()
    found, broken = run.opened().newest()
    assert found is not None
    assert found.server_round == 2
    assert len(broken) == (file.name != "manifest.json")


def test_where_all_are_broken_nothing_is_continued_and_nothing_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.play(range(3))
    for server_round in (2, 3):
        (tmp_path / "checkpoints" / "m" / f"{server_round:05d}" / "server.safetensors").write_bytes(b"x")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(StateError, match=r"no checkpoint is intact.*\n.*00003: .*1 bytes instead of \d+\n.*00002"):
        run.opened().newest()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def rewritten(file: Path, **changes: Any) -> None:
    """A stranger's manifest, with a checksum that fits."""
    manifest = json.loads(file.read_bytes().split(b"\n")[0]) | changes
    line = json.dumps(manifest).encode()
    file.write_bytes(line + b"\n" + sha256(line).hexdigest().encode() + b"\n")


def test_a_score_of_a_former_version_is_not_compared(tmp_path: Path) -> None:
    """It was measured on test examples: the best checkpoint is that with the best score on validation."""
    run = Run(tmp_path, keep=1)
    run.play([0], [0.9])
    rewritten(tmp_path / "checkpoints" / "m" / "00001" / "manifest.json", version=1)
    run.checkpoints = run.opened()
    found, _ = run.checkpoints.newest()
    assert found is not None
    assert found.score is None
    run.play([1, 2], [0.5, 0.4])
    assert run.names() == ["00002", "00003"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_states": {"c": ["../../../etc/passwd", 0, 1, ""]}}, "is not the name of a file of states"),
        ({"client_states": {"c": ["/etc/passwd", 0, 1, ""]}}, "is not the name of a file of states"),
        ({"client_states": {"c": [f"00001-{'a' * 16}-000000-{'b' * 32}.safetensors", 0, 1, ""]}}, "cannot be read"),
        ({"client_states": {"c": ["x", -1, 1, ""]}}, "manifest.json is not a manifest"),
        ({"client_states": 3}, "manifest.json is not a manifest"),
        ({"version": 3}, "manifest.json is not a manifest"),
        ({"surprise": 1}, "manifest.json is not a manifest"),
        ({"server_round": 7}, "it was moved here"),
        ({"method": "other"}, "it was moved here"),
        ({"server": {"bytes": 1, "sha256": "0"}}, "instead of 1"),
    ],
)
def test_a_manifest_of_a_stranger_leads_nowhere(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = Run(tmp_path, keep=1, best=False)
    run.play(range(2))
    rewritten(tmp_path / "checkpoints" / "m" / "00002" / "manifest.json", **changes)
    with pytest.raises(StateError, match=message):
        run.opened().newest()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(line=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_anything_as_a_manifest(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    run = Run(tmp_path_factory.mktemp("run"))
    run.play([0])
    line = line.replace(b"\n", b" ")
    file = run.place.local / "checkpoints" / "m" / "00001" / "manifest.json"
    file.write_bytes(line + b"\n" + sha256(line).hexdigest().encode() + b"\n")
    with pytest.raises(StateError, match="no checkpoint is intact"):
        run.opened().newest()
