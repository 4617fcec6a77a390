"""Turns measurements into entries of the JSON file, and these into the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from measure import Measurement
from workloads import Workload

FEDRAY = "fedray"
MB = 1e6

COLUMNS = (
    *("row", "contender", "ms per client", "times fedray's"),
    *("rounds", "first round, s", "start-up, s", "peak, MB"),
)

HEADER = """# Benchmarks

`make bench` measures fedray, plain loops and peer frameworks on the same work, one after another, and writes this page
and [`benchmarks.json`](benchmarks.json). `make bench ARGS="W0 W3"` measures some rows and keeps the others.
`make bench ARGS=--quick` runs everything at tiny sizes and does not touch this page.

All contenders take the same steps on the same shapes in float32. They read the same files of base weights, tokens and
images, and use the same build of torch, one thread per process, and two workers unless a row says otherwise. Evaluation
and telemetry are off. Repeats are interleaved. A figure is the median over the repeats, with their range; a ratio is
computed within each repeat. The first round and the start-up (until the first round begins, imports included) have
their own columns and enter no other figure. Memory is the peak PSS of the process tree over the first rounds, measured
in a separate run.
"""

NOTES = """## What the rows are

| row | work |
|---|---|
| W0 | a step that adds 1 to a payload of 4 KB; 1,000 clients, 50 or all of them per round, 10 rounds |
| W1 | the same with 1, 10 and 50 MB; 20 of 100 clients, 10 rounds |
| W2 | a CNN of 1,626,442 parameters; 50 of 1,000 clients, 50 images of 32 × 32 × 3, 5 SGD steps of 10; 20 rounds |
| W3 | a Llama decoder, 4 layers, d 256, vocabulary 2,000; LoRA r = 8 on query and value (32,768 parameters); 20 of \
200 clients, 64 sequences of 64 tokens, 8 AdamW steps of 8; 20 rounds |
| W3s | W3 with 8 steps of one or two sequences of 32 tokens |
| W4 | W3 in which every client also keeps and changes 1 MB of private state |
| W5 | W0 with 20 of 100 clients in 5 rounds; in the second round the first client kills its worker |
| W6 | W2 with 20 clients in 3 rounds; two processes with the same configuration should end with the same numbers |
| A1 | every client's geometric median of the others, d = 100,000, against one run of Weiszfeld's iteration per client |
| A2 | the masked cluster update and its best rank-r approximation, against forming and decomposing the dense matrix |
| S1 | 10,000 clients with 300 KB of state each, 100 per round, 50 rounds: the driver's memory |

Some differences remain:

- fedray's own `fedavg` trains W3, W3s and W4. Its loop checks that losses are finite, and its accounting counts bytes.
  All other contenders use a loop of ten lines on peft's LoRA. fedray computes logits for the 63 tokens that are
  predicted, transformers' own loss for all 64.
- In W0, W1 and W2, fedray runs a custom method that does the common work itself and never calls fedray's training loop.
- fedray's actors compute means locally and return one array for several clients. The servers of the other frameworks
  receive every update.
- Each framework draws its own clients, so cohorts differ.
- pfl sends nothing between server and client: each process trains its own copy of the model, and the processes
  synchronise once per round. In W4 it runs in one process, which holds all states.
- flwr's Ray starts after its server has started, so most of its start-up is in its first round.
- The payloads and states of the plain loops are in shared memory.
"""


@dataclass(frozen=True)
class Spread:
    """The median and the range of some values."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return _short(self.middle)
        return f"{_short(self.middle)} ({_short(self.low)}–{_short(self.high)})"


def entry(workload: Workload, timed: Sequence[Measurement], memory: Measurement | None) -> dict[str, Any]:
    """Return the entry of the JSON file for one contender in one row.

    Raises:
        ValueError: the contender has not done the work.
    """
    for measurement in (*timed, *([memory] if memory else [])):
        check(workload, measurement)
    found: dict[str, Any] = {
        "rounds": workload.rounds,
        "client_ms": [1000 * measurement.round_s / workload.per_round for measurement in timed],
        "first_round_s": [measurement.first_round_s for measurement in timed],
        "startup_s": [measurement.startup_s for measurement in timed],
        "load": [measurement.load for measurement in timed],
        "facts": [dict(measurement.facts) for measurement in timed],
    }
    if memory is not None and memory.sizes:
        found["peak_mb"] = memory.peak_bytes / MB
        if any(driver for _, _, driver in memory.sizes):
            found["driver_mb"] = [memory.driver_bytes(share) / MB for share in (0.2, 0.4, 0.6, 0.8, 1.0)]
    return found


def check(workload: Workload, measurement: Measurement) -> None:
    """Check that a measurement did the row's work.

    Raises:
        ValueError: rounds are missing, or the payload of the null step does not equal the number of rounds.
    """
    value, rounds = measurement.facts["value"], len(measurement.ends)
    # Approximately: some contenders compute a mean as a sum of weighted parts.
    right = math.isfinite(value) and (workload.kind != "null" or math.isclose(value, rounds, rel_tol=1e-4))
    if not right or rounds < 2:
        raise ValueError(f"{workload.row}: {rounds} rounds ended with {value}; in a null step both are the same")


def same_size(contenders: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether all contenders send the same number of values."""
    return len({facts["numbers"] for found in contenders.values() for facts in found["facts"]}) <= 1


def page(results: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
        results: the content of the JSON file.
    """
    rows, kernels = results.get("rows", {}), results.get("kernels", {})
    parts = [HEADER, *(_where(entry) for entry in _places(results))]
    if rows:
        parts.append(_table("Rounds", COLUMNS, [line for row in rows for line in _lines(row, rows[row])]))
    if kernels:
        lines = [_kernel_line(row, kernels[row]) for row in kernels]
        parts.append(_table("Aggregation", ("row", "fedray, s", "direct, s", "times fedray's", ""), lines))
    asked = results.get("reliability", {})
    if asked:
        lines = [line for row in asked for line in _reliability_lines(row, asked[row])]
        columns = ("row", "contender", "updates per round", "of", "final SHA-256")
        parts.append(_table("Lost updates and reproducibility", columns, lines))
    flat = [line for row in rows for line in _driver_lines(row, rows[row])]
    if flat:
        parts.append(_table("The driver's memory", ("row", "MB after 20 %", "40 %", "60 %", "80 %", "100 %"), flat))
    return "\n".join([*parts, NOTES])


def _table(title: str, columns: Sequence[str], lines: Sequence[str]) -> str:
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return "\n".join([f"## {title}\n", header, *lines, ""])


def _lines(row: str, measured: Mapping[str, Any]) -> list[str]:
    contenders = measured["contenders"]
    ours = contenders.get(FEDRAY, {}).get("client_ms")
    size = "" if same_size(contenders) else " (!)"
    lines = []
    for name, found in contenders.items():
        ratio = "" if ours is None else Spread.of([a / b for a, b in zip(found["client_ms"], ours, strict=True)])
        spreads = (Spread.of(found[column]) for column in ("first_round_s", "startup_s"))
        time, peak = Spread.of(found["client_ms"]), _short(found.get("peak_mb"))
        cells = [row + size, name, time, ratio, found["rounds"], *spreads, peak]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    failed = measured.get("failed", {}).items()
    return lines + [f"| {row} | {name} | – | | | | | {reason} |" for name, reason in failed]


def _kernel_line(row: str, found: Mapping[str, Any]) -> str:
    ratio = Spread.of([direct / own for direct, own in zip(found["direct"], found["seconds"], strict=True)])
    return f"| {row} | {Spread.of(found['seconds'])} | {Spread.of(found['direct'])} | {ratio} | {found['note']} |"


def _reliability_lines(row: str, measured: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in measured["contenders"].items():
        updates = found.get("failed") or ", ".join(map(str, found["updates"]))
        digest = (found.get("sha256") or "")[:12] if row == "W6" else ""
        lines.append(f"| {row} | {name} | {updates} | {measured['asked']} | {digest} |")
    return lines


def _driver_lines(row: str, measured: Mapping[str, Any]) -> list[str]:
    values = measured["contenders"].get(FEDRAY, {}).get("driver_mb")
    return [f"| {row} | {' | '.join(_short(value) for value in values)} |"] if values and row.startswith("S") else []


def _places(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return each place and date of measurement once, with its rows."""
    places: dict[str, dict[str, Any]] = {}
    for row, measured in {name: one for part in results.values() for name, one in part.items()}.items():
        place = measured["place"]
        places.setdefault(str(place), {**place, "rows": []})["rows"].append(row)
    return list(places.values())


def _where(place: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    return (
        f"{', '.join(place['rows'])}: measured on {place['date']} on {place['machine']}; {versions}; "
        f"load average at the start of a repeat: {place['load']}.\n"
    )


def _short(value: float | None) -> str:
    """Return three significant digits, or all digits before the decimal point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
