"""The benchmark suite's own sums, and that its plain loop and fedray do the same work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedray.config import load_config
from fedray.experiment.prepare import prepare
from fedray.federation.local_pool import LocalPool
from fedray.federation.tasks import ClientTask, Downlink

PROGRAMS = Path(__file__).parents[2] / "jobs" / "benchmarks"


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))


def measurement(ends: tuple[float, ...], **facts: Any) -> Any:
    from measure import Measurement

    return Measurement(load=0.5, started=10.0, begun=14.0, ends=ends, facts=facts)


def workload(**fields: Any) -> Any:
    from workloads import Workload

    return Workload("W0", **{"kind": "null", "clients": 8, "per_round": 4, "rounds": 3, "payload": 2} | fields)


def test_a_rounds_time_leaves_out_the_start_and_the_first_round() -> None:
    """Started at 10, first round from 14 to 17, then two rounds of 2 seconds with 4 clients: 500 ms per client."""
    from table import entry

    found = entry(workload(), [measurement((17.0, 19.0, 21.0), value=3.0, numbers=2)], None)
    assert (found["startup_s"], found["first_round_s"], found["client_ms"]) == ([4.0], [3.0], [500.0])


def test_work_that_was_not_done_is_no_result() -> None:
    """After three null steps the payload is 3."""
    from table import entry

    with pytest.raises(ValueError, match="3 rounds ended with 2"):
        entry(workload(), [measurement((17.0, 19.0, 21.0), value=2.0, numbers=2)], None)


def test_the_drivers_memory_is_that_when_a_round_ended() -> None:
    """It is looked at in moments of its own; when the last round has ended the driver may be gone."""
    sizes = ((17.2, 900, 100), (19.1, 900, 200), (20.5, 900, 300), (21.1, 600, 0))
    seen = replace(measurement((17.0, 19.0, 21.0)), sizes=sizes)
    assert [seen.driver_bytes(share) for share in (0.2, 0.4, 0.7, 1.0)] == [100, 100, 200, 300]
    assert seen.peak_bytes == 900


def test_ratios_are_taken_within_a_repeat() -> None:
    """fedray needs 1, 2, 4 ms and its peer 9, 3, 4 ms: the ratios are 9, 1.5, 1, and their median is not the medians'
    ratio of 4 / 2."""
    from table import page

    def found(times: list[float], numbers: int) -> dict[str, Any]:
        return {
            "rounds": 20,
            "client_ms": times,
            "first_round_s": [1.0] * 3,
            "startup_s": [2.0, 3.0, 2500.0],
            "load": [0.0] * 3,
            "facts": [{"numbers": numbers}] * 3,
        }

    place = {"date": "2026-01-02", "machine": "2 × CPU", "versions": {"torch": "2"}, "load": "0.0 to 0.1"}
    contenders = {"fedray": found([1.0, 2.0, 4.0], 5) | {"peak_mb": 1234.5}, "peer": found([9.0, 3.0, 4.0], 5)}
    row = {"contenders": contenders, "failed": {"other": "failed"}, "place": place}
    text = page({"rows": {"W0": row}, "kernels": {}})
    assert "| W0 | fedray | 2 (1–4) | 1 | 20 | 1 | 3 (2–2,500) | 1,234 |" in text
    assert "| W0 | peer | 4 (3–9) | 1.5 (1–9) | 20 | 1 | 3 (2–2,500) |  |" in text
    assert "| W0 | other | – | | | | | failed |" in text
    assert "W0: measured on 2026-01-02 on 2 × CPU; torch 2; load average at the start of a repeat: 0.0 to 0.1." in text
    row["contenders"] = {"fedray": found([1.0] * 3, 5), "peer": found([1.0] * 3, 6)}
    assert "| W0 (!) | peer |" in page({"rows": {"W0": row}, "kernels": {}})


def test_the_plain_loop_and_fedray_reach_the_same_lora(tmp_path: Path) -> None:
    """One client, two AdamW steps, from the same base weights and the same first LoRA. Its sequences are all equal, so
    that the order in which either draws them does not matter."""
    import torch
    from local_work import LocalWork
    from with_fedray import config
    from workloads import make_files, rows

    both = replace(rows(True, tmp_path)["W3"], clients=1, per_round=1, rounds=1, examples=4, tokens=24)
    make_files(both)
    tokens = np.load(both.data)
    np.save(both.data, np.broadcast_to(tokens[:, :1], tokens.shape))
    prepared = prepare(load_config({**config(both, 1, tmp_path / "fedray"), "runtime": "inline"}))
    pool = LocalPool(prepared.data.shards)
    (entry,) = prepared.config.method
    initial = pool.setup(prepared.worker_setups(entry))
    (client,), server = prepared.clients, prepared.federation(entry, initial, pool).server
    downlink = Downlink(0, server.shared, 0)
    task = ClientTask(client, 0, downlink, measure=False, shard=prepared.data.shards[client.id])
    result = pool.workers["default"].train(task)
    ours = result.payload.adapter
    assert result.report.steps == both.steps == 2

    work = LocalWork(both)
    assert [tuple(p.shape) for p in work.parameters] == [slot.shape for slot in initial.layouts["lora"].slots]
    theirs = work.train(0, 0, initial.vectors["lora"])
    moved = np.abs(theirs - initial.vectors["lora"]).max()
    assert moved > 1e-3
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * moved + 1e-7)
    torch.set_num_threads(1)


def test_all_rows_are_shrunk_by_quick(tmp_path: Path) -> None:
    from workloads import rows

    whole, quick = rows(False, tmp_path), rows(True, tmp_path)
    assert list(whole) == list(quick)
    assert all(row.clients * row.rounds * row.steps <= 200 and row.rounds == 3 for row in quick.values())
    assert json.loads(whole["W3"].to_json())["per_round"] == 20
