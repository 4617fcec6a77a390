"""What becomes of clients on whom something goes wrong, on real local Ray and without it."""

from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from faults import Faulty

import fedray
from fedray.errors import ClientFailure, TrainingError

VICTIM = "client_001"


@pytest.fixture
def config(tiny: dict[str, Any]) -> dict[str, Any]:
    """All four clients in every round; one actor for each tier."""
    clients = {"count": 4, "tiers": {"all": {"share": 1.0, "num_cpus": 1, "actors": 2}}, "max_failures": 1}
    return {**tiny, "clients": clients, "lora": {}}


def faulty(fault: str, tmp_path: Path, **options: Any) -> dict[str, Any]:
    marks = tmp_path / f"marks-{fault}"
    marks.mkdir(exist_ok=True)
    entry = {"class": f"{Faulty.__module__}.Faulty", "label": "fedavg", "fault": fault, "marks": str(marks)}
    return {**entry, "clients": [VICTIM], **options}


def ledger(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path / "events.parquet")


@pytest.mark.parametrize(
    ("fault", "kind", "options"),
    [("raise", "exception", {}), ("kill", "actor died", {}), ("hang", "timeout", {"client_timeout_s": 8})],
)
def test_a_fault_that_passes_costs_no_update_and_no_bit(
    config: dict[str, Any], cluster: None, tmp_path: Path, fault: str, kind: str, options: dict[str, Any]
) -> None:
    undisturbed = fedray.run({**config, "method": "fedavg"}, runtime="inline", output=tmp_path / "undisturbed")
    method = faulty(fault, tmp_path, server_round=1, times=1)
    found = fedray.run({**config, "method": [method]}, output=tmp_path / "run", clients=options)
    assert found["fedavg"].state_sha256 == undisturbed["fedavg"].state_sha256
    assert (found.rounds().clients == 4).all()
    rows = ledger(found.path)
    assert rows.action.eq("rerun").all()
    row = rows[rows.clients.map(lambda clients: VICTIM in clients)].iloc[0]
    assert (row.method, row.server_round, row.attempt, row.kind) == ("fedavg", 1, 1, kind)
    assert "process" in row.node


@pytest.mark.parametrize(
    ("fault", "error"), [("raise", ClientFailure), ("kill", ClientFailure), ("diverge", TrainingError)]
)
def test_a_fault_that_stays_ends_the_run_and_is_named(
    config: dict[str, Any], cluster: None, tmp_path: Path, fault: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        fedray.run({**config, "method": [faulty(fault, tmp_path)]}, output=tmp_path / "run")
    if error is ClientFailure:
        assert f"client {VICTIM}: failed 2 times in round 0" in str(raised.value)
        assert ("in train_client" in str(raised.value)) == (fault == "raise")
    else:
        assert str(raised.value) == "its loss is nan"
    rows = ledger(tmp_path / "run")
    assert rows.iloc[-1].action == "run ended"
    assert rows.iloc[-1].clients.tolist() == [VICTIM]


@pytest.mark.parametrize(
    ("fault", "fuse", "runtimes"),
    [
        ("raise", 4, ("ray", "inline")),
        ("nan", "off", ("ray", "inline")),
        *((fault, fuse, ("inline",)) for fault in ("diverge", "shape", "scale", "flip") for fuse in ("off", 4)),
    ],
)
def test_who_is_left_out_does_not_touch_the_others(
    config: dict[str, Any],
    cluster: None,
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
