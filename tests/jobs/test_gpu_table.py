"""The table of jobs/benchmarks/gpu.py: its sums by hand, rows that fail, and every row at tiny sizes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parents[2] / "jobs" / "benchmarks"


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))


def test_speed_ups_and_shares_by_hand() -> None:
    """1,000 parameters and 8 steps of 128 tokens: 4,096,000 operations in 10 ms are a tenth of 4,096 MFLOP/s. The plain
    loop took 250 ms, 25 times as long. The prediction of 3 GiB is 1.5 times the peak."""
    import gpu

    rows = gpu.all_rows(gpu.WHOLE)
    wide = "fedavg, batch 1, 32 clients in one step"
    results: dict[str, Any] = {
        gpu.RATE: {"rate": 4.096e9, "note": "0.0041 TFLOP/s"},
        "plain peft loop, batch 1": {"client_ms": 250.0, "parameters": 1000},
        wide: {"client_ms": 10.0, "parameters": 1000, "peak": 2 * gpu.GIB, "predicted": 3 * gpu.GIB},
        "engine torch": {"error": "OutOfMemoryError: a | b"},
    }
    text = gpu.page(rows, results, gpu.WHOLE, "today")
    assert f"| {wide} | 10 | 25 × plain peft loop, batch 1 | 10.0% | 2 | 3 | 1.50 |  |" in text
    assert "| plain peft loop, batch 1 | 250 |  | 0.4% |  |  |  |  |" in text
    assert "| engine torch |  |  |  |  |  |  | failed: OutOfMemoryError: a / b |" in text
    assert f"The best width: {wide}, with 10% of the measured rate." in text
    assert "engine ZeRO-0" not in text


@pytest.mark.parametrize("quick", [True, False])
def test_rows_are_compared_with_rows_that_there_are(quick: bool) -> None:
    import gpu

    rows = gpu.all_rows(gpu.QUICK if quick else gpu.WHOLE)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {row.reference for row in rows} <= {"", *names}
    assert sum(row.measure == "engine" for row in rows) == 4


def test_a_row_that_raises_says_so_and_the_next_one_is_measured(tmp_path: Path) -> None:
    import gpu
    import gpu_rows

    wrong = gpu.Row("wrong", "matrix_rate", {"unknown": 1})
    rows = [asdict(row) for row in (wrong, gpu.Row(gpu.RATE, "matrix_rate"))]
    task = {"rows": rows, "sizes": asdict(gpu.QUICK), "device": "cpu", "folder": str(tmp_path)}
    gpu_rows.main(json.dumps(task), str(tmp_path / "results"))
    first, second = map(json.loads, (tmp_path / "results").read_text().splitlines())
    assert first["error"].startswith("TypeError: matrix_rate()")
    assert (second["row"], second["rate"] > 0) == (gpu.RATE, True)


PROGRAM = """
import json, sys, time
for row in json.loads(sys.argv[1])["rows"]:
    if row["measure"] == "dies":
        print("some words")
        sys.exit("the last words")
    if row["measure"] == "hangs":
        time.sleep(600)
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps({"row": row["name"], "client_ms": 1.0}) + chr(10))
"""


MEASURING = """
import json, sys
from pathlib import Path
import gpu
gpu.HERE = Path(sys.argv[1])
measures = {"a": "runs", "b": "dies", "c": "runs", "d": "hangs", "e": "runs"}
rows = [gpu.Row(name, measure, process=name if name > "b" else "ab") for name, measure in measures.items()]
saved = []
gpu.measure_rows(rows[:3], gpu.QUICK, "cpu", 300.0, lambda results: saved.append(dict(results)))
gpu.measure_rows(rows[3:], gpu.QUICK, "cpu", 1.0, lambda results: saved.append(dict(results)))
print(json.dumps(saved))
"""


def test_processes_that_die_or_hang_leave_what_they_measured(tmp_path: Path) -> None:
    """Each result is saved when it is there, and the row after the one that hangs is not begun. In a process of its
    own, for all processes below it are killed."""
    (tmp_path / "gpu_rows.py").write_text(PROGRAM)
    command = [sys.executable, "-c", MEASURING, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAMS)}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=200).stdout
    *whole, late = json.loads(printed)
    died, measured = {"error": "the process ended with 1: the last words"}, {"client_ms": 1.0}
    assert [len(results) for results in whole[:3]] == [1, 2, 3]
    assert whole[2] == {"a": measured, "b": died, "c": measured}
    assert late == {name: {"error": "not measured: the time was up"} for name in "de"}


@pytest.mark.slow
@pytest.mark.timeout(3000)  # the first use on a machine builds DeepSpeed's extensions
def test_every_row_at_tiny_sizes(own_cluster: None, tmp_path: Path) -> None:
    import gpu

    command = [sys.executable, str(PROGRAMS / "gpu.py"), "--quick", "--device", "cpu", "--seconds", "2500"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, stdout=subprocess.DEVNULL, timeout=2900)
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["rows"]
    assert list(found) == [row.name for row in gpu.all_rows(gpu.QUICK)]
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    text = (tmp_path / "gpu.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in found)
    timed = {name: row for name, row in found.items() if "client_ms" in row}
    assert all(row["client_ms"] > 0 and row["peak"] > 0 for row in timed.values())
    assert all(row["predicted"] > 0 for name, row in timed.items() if name.startswith(("fedavg", "engine")))
