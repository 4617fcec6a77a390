"""Runs that end early and are continued: the same bits as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from calling import Calling
from tiny import tiny_bert

import fedray
from fedray.config import dump_yaml, load_config
from fedray.errors import ConfigError, StateError
from fedray.experiment.resume import continued
from fedray.federation import result_batches as blocks
from fedray.federation.events import Event, MethodFinished, RoundFinished, TasksFinished
from fedray.results.run_result import RunResult
from fedray.storage import tables
from fedray.storage.paths import StoragePath

METHODS = [
    "local",
    {"name": "fedavg", "label": "fedavg-reft", "adapter": "reft"},
    "fedreft",
    "fedalt",
    {"name": "fedhft", "warmup_rounds": 1},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three rounds of three of four clients, without Ray."""
    return {
        "name": "tiny",
        "seed": 3,
        "rounds": 3,
        "method": METHODS[1::3],
        "model": tiny_bert(),
        "data": {
            "source": "synthetic",
            "examples_per_client": 24,
            "max_length": 32,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "partition": {"kind": "by_file"},
        "clients": {"count": 4, "per_round": 3},
        "lora": {"rank": 2},
        "reft": {"rank": 2},
        "train": {"lr": 5e-3},
        "device": "cpu",
        "runtime": "inline",
    }


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return fedray.run(config, output=tmp_path_factory.mktemp("runs") / "whole")


class Stop(Exception):
    pass


def stop_at(kind: type[Event], number: int) -> Callable[[Event], None]:
    """Raise at the event of this kind with this number."""
    left = number

    def on_event(event: Event) -> None:
        nonlocal left
        if isinstance(event, kind):
            left -= 1
            if left < 0:
                raise Stop

    return on_event


def interrupted(config: Any, output: Path, kind: type[Event], number: int, **options: Any) -> None:
    with pytest.raises(Stop):
        fedray.run(config, output=output, callbacks=[Calling(stop_at(kind, number))], **options)


def assert_same(one: RunResult, other: RunResult) -> None:
    mine, theirs = one.to_pandas(), other.to_pandas()
    for frame in (mine, theirs):
        assert frame.pop("wall_seconds").gt(0).all()
        assert frame.pop("simulated_seconds").gt(0).all()
    pd.testing.assert_frame_equal(mine, theirs)
    for ours, yours in ((one.rounds(), other.rounds()), (one.clients(), other.clients())):
        timed = [column for column in ours if "seconds" in column]
        pd.testing.assert_frame_equal(ours.drop(columns=timed), yours.drop(columns=timed))
    assert len(one.memory()) == len(other.memory())


def beside(path: Path) -> list[str]:
    """Files of rows that are not in their table's one file."""
    return sorted(file.name for file in path.glob("*-0*.arrow"))


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (TasksFinished, 0),
        (RoundFinished, 0),
        (TasksFinished, 8),
        (RoundFinished, 2),
        (RoundFinished, 3),
        (MethodFinished, 0),
        (RoundFinished, 5),
        (MethodFinished, 1),
    ],
)
def test_wherever_a_run_ends_it_is_continued_with_the_same_bits(
    config: dict[str, Any],
    whole: RunResult,
    tmp_path: Path,
    kind: type[Event],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "BATCH_CLIENTS", 1)  # an event per client, however fast the machine is
    monkeypatch.setattr(tables, "SMALL_ROWS", 2)
    monkeypatch.setattr(tables, "PART", 0.3)  # rows of some rounds lie beside each table
    with monkeypatch.context() as killed:  # nobody puts the tables into one file
        killed.setattr(tables.Table, "compact", lambda table: None)
        interrupted(config, tmp_path / "run", kind, number)
    if (kind, number) == (RoundFinished, 2):
        assert (tmp_path / "run" / "clients-000000006.arrow").is_file()
    found = fedray.run(config, resume=tmp_path / "run")
    assert_same(found, whole)
    assert beside(found.path) == []
    adapters = {name: blob for name, blob in files(found.path).items() if name.startswith("adapters")}
    assert adapters == {name: blob for name, blob in files(whole.path).items() if name.startswith("adapters")}
    if (kind, number) == (RoundFinished, 2):
        (row,) = found.events().to_dict("records")
        assert (row["method"], row["kind"], row["action"]) == ("fedavg-reft", "interrupted", "continued after 3 rounds")


def test_tables_are_one_file_each_when_a_method_or_the_run_ends(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ends in its own process; until then the rounds after the first lie beside."""
    monkeypatch.setattr(tables, "SMALL_ROWS", 2)
    monkeypatch.setattr(tables, "PART", 0.01)
    seen: list[tuple[type[Event], list[str]]] = []

    def look(event: Event) -> None:
        seen.append((type(event), beside(tmp_path / "whole")))

    fedray.run(config, output=tmp_path / "whole", callbacks=[Calling(look)])
    assert {"clients-000000003.arrow", "clients-000000006.arrow"} <= {name for _, found in seen for name in found}
    assert [found for kind, found in seen if kind is MethodFinished] == [[], []]
    interrupted(config, tmp_path / "stopped", RoundFinished, 2)
    assert beside(tmp_path / "stopped") == []
    assert len(pd.read_parquet(tmp_path / "stopped" / "clients.parquet")) == 9


def test_every_method_however_often_its_run_ends(config: dict[str, Any], tmp_path: Path) -> None:
    """After two rounds, and then after every third one, so that each method ends at another place."""
    config = {**config, "method": METHODS}
    whole = fedray.run(config, output=tmp_path / "whole")
    interrupted(config, tmp_path / "run", RoundFinished, 1)
    for _ in range(4 * len(METHODS)):
        try:
            found = fedray.run(config, resume=tmp_path / "run", callbacks=[Calling(stop_at(RoundFinished, 2))])
            break
        except Stop:
            continue
    assert_same(found, whole)


def test_every_second_round_is_enough(config: dict[str, Any], whole: RunResult, tmp_path: Path) -> None:
    """Stopped after round 3 of the first method, whose checkpoint is that of round 2."""
    given = {**config, "method": METHODS[1:2], "checkpoint": {"every": 2, "keep": 1}}
    interrupted(given, tmp_path / "run", RoundFinished, 1)
    interrupted({**given, "rounds": 5}, tmp_path / "long", RoundFinished, 2)
    found = fedray.run(given, resume=tmp_path / "run")
    assert found["fedavg-reft"].state_sha256 == whole["fedavg-reft"].state_sha256
    fedray.run({**given, "rounds": 5}, resume=tmp_path / "long")
    rows = RunResult.load(tmp_path / "long").rounds()
    assert rows.server_round.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_finished_run_gets_more_rounds(config: dict[str, Any], whole: RunResult, tmp_path: Path) -> None:
    fedray.run({**config, "rounds": 1}, output=tmp_path / "run")
    assert_same(fedray.run(config, resume=tmp_path / "run"), whole)
    assert_same(fedray.run(config, resume=tmp_path / "run"), whole)
    with pytest.raises(ConfigError, match=r"rounds: 2, but fedavg-reft of .* already has 3"):
        fedray.run({**config, "rounds": 2}, resume=tmp_path / "run")


@pytest.mark.parametrize(
    "train",
    [
        {"schedule": "linear", "schedule_over": "run"},
        {"round_schedule": "cosine"},
        {"warmup_rounds": 0.5},
    ],
)
def test_a_schedule_over_all_rounds_has_a_fixed_number_of_rounds(
    config: dict[str, Any], tmp_path: Path, train: dict[str, Any]
) -> None:
    """The finished rounds had other learning rates than those of a longer run. A number of warm-up rounds is fixed."""
    given = {**config, "method": METHODS[1:2]}
    fedray.run({**given, "train": {**config["train"], **train}, "rounds": 2}, output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another number of rounds: stored is 2, given is 3, and .* of fedavg-reft"):
        fedray.run({**given, "train": {**config["train"], **train}}, resume=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.lr": 0.1}, r"train.lr: stored is 0.005, given is 0.1"),
        ({"seed": 4}, r"seed: stored is 3, given is 4"),
        ({"method": ["fedalt", METHODS[4]]}, r"method.0.name: stored is 'fedavg', given is 'fedalt'"),
        ({"clients.max_failures": 9, "clients.per_round": 2}, r"\n  clients.per_round: stored is 3, given is 2$"),
    ],
)
def test_another_configuration_is_refused(
    config: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    interrupted(config, tmp_path / "run", RoundFinished, 0)
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        fedray.run(config, resume=tmp_path / "run", **change)
    assert files(tmp_path / "run") == before


def test_what_changes_no_result_may_change(config: dict[str, Any], whole: RunResult, tmp_path: Path) -> None:
    interrupted(config, tmp_path / "run", RoundFinished, 0)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    changes: dict[str, Any] = {"name": "other", "clients.actors": 1, "checkpoint.keep": 5, "storage_path": "elsewhere"}
    assert_same(fedray.run(config, resume=tmp_path / "moved", **changes), whole)


def test_what_was_found_out_at_the_start_is_not_found_out_again(config: dict[str, Any], tmp_path: Path) -> None:
    """Another timing would give other clients the same place in time."""
    given = {**config, "method": ["fedavg"], "clients": {"count": 4, "deadline_s": 1e6, "fuse": "auto"}}
    interrupted(given, tmp_path / "run", RoundFinished, 0)
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["clients"]["example_seconds"] > 0
    fedray.run(given, resume=tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == resolved


@pytest.mark.parametrize("recorded", [{"fuse": "off", "threads": 1}, {"fuse": 4, "threads": 2}])
def test_what_depends_on_the_device_stays_as_it_was_recorded(
    recorded: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """Runs of older versions recorded what is left to the device now, and a run on a GPU the width that it found."""
    before = load_config({**config, "clients": {"count": 4, **recorded}})
    (tmp_path / "config.yaml").write_text(dump_yaml(before))
    given = load_config({**config, "clients": {"count": 4}})
    assert (given.clients.fuse, given.clients.threads) == (None, None)
    assert continued(StoragePath.of(tmp_path), given) == before
    other = load_config({**config, "clients": {"count": 4, "fuse": 2}})
    with pytest.raises(ConfigError, match="clients.fuse: stored is"):
        continued(StoragePath.of(tmp_path), other)


def test_other_data_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    rows = "".join(f"{who},{'good' if k % 2 else 'bad'} {k},{k % 2}\n" for who in "ab" for k in range(12))
    file.write_text(f"who,text,label\n{rows}")
    given = {
        **config,
        "method": ["fedavg"],
        "data": {"source": "files", "files": {"train": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "partition": {"kind": "by_column", "column": "who"},
        "clients": {},
    }
    interrupted(given, tmp_path / "run", RoundFinished, 0)
    file.write_text(f"who,text,label\n{rows}a,one more,1\n")
    with pytest.raises(ConfigError, match="the data have changed since the run began"):
        fedray.run(given, resume=tmp_path / "run")


def test_what_is_no_run_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run: it has no config.yaml"):
        fedray.run(config, resume=tmp_path)
    with pytest.raises(ConfigError, match="leave out --output"):
        fedray.run(config, resume=tmp_path, output=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_without_checkpoints_nothing_is_continued_and_nothing_lost(config: dict[str, Any], tmp_path: Path) -> None:
    given = {**config, "checkpoint": {"every": 0}}
    interrupted(given, tmp_path / "run", RoundFinished, 1)
    with pytest.raises(StateError, match="2 recorded rounds, but no checkpoint to continue from"):
        fedray.run(given, resume=tmp_path / "run")
    assert len(pd.read_parquet(tmp_path / "run" / "rounds.parquet")) == 2


@pytest.mark.parametrize(
    ("file", "damage", "error"),
    [
        ("rounds.parquet", lambda blob: blob[:-9], "rounds.parquet: cannot be read"),
        ("clients.parquet", lambda blob: b"", "clients.parquet: cannot be read"),
        ("config.yaml", lambda blob: blob[:40], "config"),
        ("summary.json", lambda blob: blob[:-9], "summary.json: is not a summary of a run"),
        ("summary.json", lambda blob: b'[{"method": "fedavg-reft"}]', "summary.json: is not a summary of a run"),
    ],
)
def test_a_damaged_file_is_named(
    config: dict[str, Any], tmp_path: Path, file: str, damage: Callable[[bytes], bytes], error: str
) -> None:
    interrupted(config, tmp_path / "run", MethodFinished, 0)
    path = tmp_path / "run" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((StateError, ConfigError), match=error):
        fedray.run(config, resume=tmp_path / "run")


def test_a_broken_checkpoint_costs_a_round_and_is_told(
    config: dict[str, Any], whole: RunResult, tmp_path: Path
) -> None:
    interrupted(config, tmp_path / "run", RoundFinished, 1)
    newest = tmp_path / "run" / "checkpoints" / "fedavg-reft" / "00002" / "server.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    found = fedray.run(config, resume=tmp_path / "run")
    assert_same(found, whole)
    assert found.events().kind.tolist() == ["checkpoint broken", "interrupted"]
    assert "00002: server.safetensors has" in found.events().cause[0]


@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_killed_at_any_moment(config: dict[str, Any], whole: RunResult, tmp_path: Path, seconds: float) -> None:
    """SIGKILL so long after the first round ended."""
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-c", "from fedray.cli.app import main; main()", "run", str(file), "--output", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (run / "rounds.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_same(fedray.run(config, resume=run), whole)
    assert not [path for path in run.rglob("*.tmp") if "states" in path.parts]


def test_nothing_is_left_open(config: dict[str, Any], tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    interrupted(config, tmp_path / "run", RoundFinished, 2)
    fedray.run(config, resume=tmp_path / "run")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
