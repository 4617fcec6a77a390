"""What becomes of clients on whom something goes wrong, on real local Ray and without it."""

from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from faults import Faulty
from tiny import tiny_experiment

import fedray
from fedray.errors import ClientFailure, TrainingError

VICTIM = "client_001"


def four_clients() -> dict[str, Any]:
    """Return an experiment with all four clients in every round; one tier with two actors."""
    clients = {"count": 4, "tiers": {"all": {"share": 1.0, "num_cpus": 1, "actors": 2}}, "max_failures": 1}
    return {**tiny_experiment(), "clients": clients, "lora": {}}


@pytest.fixture
def config() -> dict[str, Any]:
    return four_clients()


def faulty(fault: str, tmp_path: Path, **options: Any) -> dict[str, Any]:
    marks = tmp_path / f"marks-{fault}"
    marks.mkdir(exist_ok=True)
    entry = {"class": f"{Faulty.__module__}.Faulty", "label": "fedavg", "fault": fault, "marks": str(marks)}
    return {**entry, "clients": [VICTIM], **options}


def ledger(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path / "events.parquet")


PASSING = {"raise": "exception", "kill": "actor died", "hang": "timeout"}
"""What happens once, and what the ledger calls it."""


@pytest.fixture(scope="module")
def passed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[fedray.RunResult, str]:
    """A run whose methods meet one fault each in round 1, and the hash of FedAvg's states without any."""
    folder, config = tmp_path_factory.mktemp("passed"), four_clients()
    undisturbed = fedray.run({**config, "method": "fedavg"}, runtime="inline", output=folder / "undisturbed")
    methods = [faulty(fault, folder, server_round=1, times=1, label=fault) for fault in PASSING]
    found = fedray.run({**config, "method": methods}, output=folder / "run", clients={"client_timeout_s": 8})
    return found, undisturbed["fedavg"].state_sha256


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_no_update_and_no_bit(passed: tuple[fedray.RunResult, str], fault: str) -> None:
    found, expected = passed
    assert found[fault].state_sha256 == expected
    rounds = found.rounds()
    assert (rounds[rounds.method == fault].clients == 4).all()
    rows = ledger(found.path)
    rows = rows[rows.method == fault]
    assert rows.action.eq("rerun").all()
    row = rows[rows.clients.map(lambda clients: VICTIM in clients)].iloc[0]
    assert (row.server_round, row.attempt, row.kind) == (1, 1, PASSING[fault])
    assert "process" in row.node


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("raise", ClientFailure),
        pytest.param("kill", ClientFailure, marks=pytest.mark.slow),
        pytest.param("diverge", TrainingError, marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_stays_ends_the_run_and_is_named(
    config: dict[str, Any], cluster: None, tmp_path: Path, fault: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        fedray.run({**config, "method": [faulty(fault, tmp_path)]}, output=tmp_path / "run")
    if error is ClientFailure:
        assert f"client {VICTIM}: failed 2 times in round 1" in str(raised.value)
        assert ("in train_client" in str(raised.value)) == (fault == "raise")
    else:
        assert str(raised.value) == "its loss is nan"
    rows = ledger(tmp_path / "run")
    assert rows.iloc[-1].action == "run ended"
    assert rows.iloc[-1].clients.tolist() == [VICTIM]


@pytest.mark.parametrize(("fault", "fuse"), [("raise", 4), pytest.param("nan", "off", marks=pytest.mark.slow)])
def test_who_is_left_out_on_ray_does_not_touch_the_others(
    config: dict[str, Any], cluster: None, tmp_path: Path, fault: str, fuse: str | int
) -> None:
    assert_left_out(config, tmp_path, fault, fuse, ("ray", "inline"))


@pytest.mark.parametrize(
    ("fault", "fuse"),
    [("nan", "off"), *((fault, fuse) for fault in ("diverge", "shape", "scale", "flip") for fuse in ("off", 4))],
)
def test_who_is_left_out_does_not_touch_the_others(
    config: dict[str, Any], tmp_path: Path, fault: str, fuse: str | int
) -> None:
    assert_left_out(config, tmp_path, fault, fuse, ("inline",))


def assert_left_out(
    config: dict[str, Any],
    tmp_path: Path,
    fault: str,
    fuse: str | int,
    runtimes: tuple[Literal["ray", "inline"], ...],
) -> None:
    """The same bits on Ray and inline; and, one by one, those of an experiment in which the victim never answers."""
    changes: dict[str, Any] = {"on_failure": "drop", "fuse": fuse}
    if fault == "scale":
        changes["update_checks"] = {"norm": 100}
    if fault == "flip":
        changes["update_checks"] = {"distance": 5}
    hashes = set()
    for runtime in runtimes:
        found = fedray.run(
            {**config, "method": [faulty(fault, tmp_path)]},
            output=tmp_path / runtime,
            runtime=runtime,
            clients=changes,
        )
        rounds, clients = found.rounds(), found.clients()
        left_out = rounds.phase.eq("train") | (fault in ("raise", "diverge"))  # nothing is sent in the final pass
        assert rounds.left_out.tolist() == left_out.astype(int).tolist()
        assert VICTIM not in set(clients[clients.phase == "train"].client)
        assert found["fedavg"].left_out == 2
        rows = ledger(found.path)
        assert set(rows[rows.action == "left out"].clients.map(tuple)) == {(VICTIM,)}
        hashes.add(found["fedavg"].state_sha256)
    if fuse == "off":
        alone = {**config, "method": [faulty("raise", tmp_path)]}
        raised = fedray.run(alone, output=tmp_path / "alone", runtime="inline", clients=changes)
        hashes.add(raised["fedavg"].state_sha256)
    assert len(hashes) == 1


def test_too_few_that_are_left_end_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    method = faulty("nan", tmp_path, clients=[VICTIM, "client_002"])
    changes = {"on_failure": "drop", "min_clients": 3}
    with pytest.raises(ClientFailure, match=r"round 1: 2 clients finished, fewer than clients.min_clients=3") as raised:
        fedray.run({**config, "method": [method]}, runtime="inline", output=tmp_path / "run", clients=changes)
    assert f"  {VICTIM}: update rejected: not finite: adapter" in str(raised.value)


def test_without_ray_the_exception_itself_ends_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        fedray.run({**config, "method": [faulty("raise", tmp_path)]}, runtime="inline", output=tmp_path / "run")
