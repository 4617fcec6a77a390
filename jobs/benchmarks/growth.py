"""Measure how the time of a round grows with the clients, with the bytes they send, and with the actors; fit exponents.

    python jobs/benchmarks/growth.py [--quick] [--output docs]

Writes growth.json, growth.svg and growth.md. Clients add 1 to the payload instead of training, so the growth is
fedray's own overhead; only the last sweep trains. Takes about ten minutes.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import matplotlib
import numpy as np
from contenders import HERE, ROOT, machine
from measure import ENVIRONMENT
from with_fedray import LastRoundEnded, config
from workloads import Workload, make_files, rows

import fedray
from fedray.federation.events import Callback, RoundFinished
from fedray.runtime.session import connected

matplotlib.use("svg")
from matplotlib import pyplot, ticker

KB = 1000 // 4
"""float32 numbers per kilobyte."""

Sweep = tuple[str, str, list[tuple[float, Workload, int]]]
"""Name, what varies, and for each value a workload and its number of workers."""


def sweeps(quick: bool, files: Path) -> list[Sweep]:
    null = Workload("growth", "null", 10_000, 100, 8, payload=1024, files=str(files))
    counts = (4, 8, 16) if quick else (100, 300, 1000, 3000, 10_000)
    sizes = (1, 10) if quick else (4, 40, 400, 4000, 40_000)
    null = replace(null, clients=counts[-1], rounds=3 if quick else null.rounds)
    trained = replace(rows(quick, files)["W3s, batch 1"], rounds=3 if quick else 5)
    return [
        ("averaged by the actors", "clients per round", [(n, replace(null, per_round=n), 2) for n in counts]),
        ("every update sent", "clients per round", [(n, replace(null, per_round=n, each=True), 2) for n in counts]),
        (
            "averaged by the actors, 20 clients",
            "KB per client",
            [(kb, replace(null, clients=20, per_round=20, payload=kb * KB), 2) for kb in sizes],
        ),
        (
            "every update sent, 20 clients",
            "KB per client",
            [(kb, replace(null, clients=20, per_round=20, payload=kb * KB, each=True), 2) for kb in sizes],
        ),
        (
            "without training, 1,000 clients",
            "actors",
            [(n, replace(null, per_round=min(1000, counts[-1])), n) for n in (1, 2, 4)],
        ),
        ("W3s, batch 1", "actors", [(n, trained, n) for n in (1, 2, 4)]),
    ]


def round_seconds(workload: Workload, workers: int) -> list[float]:
    """Return the seconds of every round except the first."""
    make_files(workload)
    ends: list[float] = []

    class Ends(Callback):
        def on_round_finished(self, event: RoundFinished) -> None:
            ends.append(monotonic())
            if event.server_round + 1 == workload.rounds:
                raise LastRoundEnded

    with TemporaryDirectory() as runs, suppress(LastRoundEnded):
        folder = Path(workload.files) / "fedray"
        fedray.run(config(workload, workers, folder), output=Path(runs) / "run", callbacks=[Ends()])
    return [float(seconds) for seconds in np.diff(ends)]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of log seconds over log x."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit a line by least squares of its relative errors; return (seconds at 0, seconds per unit)."""
    x, y = np.array(points).T
    fixed, each = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1) / y[:, None], np.ones_like(y), rcond=None)[0]
    return float(fixed), float(each)


def page(found: Mapping[str, Any]) -> str:
    parts = [
        "# Growth\n",
        "The time of a round as a function of the number of clients, the bytes that each client sends, and the number",
        "of actors. Times are medians over a run's rounds without the first one, with their range. The exponent is the",
        "slope on logarithmic axes. The line has the least squared relative errors. The page is the output of",
        "`python jobs/benchmarks/growth.py`.\n",
        "Clients add 1 to the payload instead of training, except in the last table. *Averaged by the actors*: the",
        "method needs only the mean, so actors send one array for many clients. *Every update sent*: the server",
        "receives each client's update.\n",
        f"Measured on {found['date']} on {found['machine']}; load average {found['load']}.\n",
        "![Seconds per round](growth.svg)\n",
    ]
    for sweep in found["sweeps"]:
        header = " | ".join(f"{x:,g}" for x, *_ in sweep["points"])
        times = " | ".join(f"{1e3 * t:.4g} ({1e3 * low:.3g}–{1e3 * high:.3g})" for _, t, low, high in sweep["points"])
        parts += [
            f"## {sweep['varied'][0].upper()}{sweep['varied'][1:]}: {sweep['name']}\n",
            f"| {sweep['varied']} | {header} |\n|{'---|' * (len(sweep['points']) + 1)}\n| ms per round | {times} |\n",
            f"Exponent {sweep['exponent']:.2f}, between the last two points {sweep['last']:.2f}{line_of(sweep)}.\n",
        ]
    return "\n".join(parts)


def line_of(sweep: Mapping[str, Any]) -> str:
    """Return the fitted line as text; empty for actors, because time falls with them and no line describes that."""
    if sweep["varied"] == "actors":
        return ""
    unit = sweep["varied"].split()[0].removesuffix("s")
    return f"; {1e3 * sweep['fixed']:.3g} ms + {1e3 * sweep['each']:.3g} ms per {unit}"


def draw(found: Mapping[str, Any], path: Path) -> None:
    varied = list(dict.fromkeys(sweep["varied"] for sweep in found["sweeps"]))
    figure, axes = pyplot.subplots(1, len(varied), figsize=(4.5 * len(varied), 4), layout="constrained")
    for axis, what in zip(axes, varied, strict=True):
        for sweep in (sweep for sweep in found["sweeps"] if sweep["varied"] == what):
            x, y, low, high = np.array(sweep["points"]).T
            label = f"{sweep['name']}: exponent {sweep['exponent']:.2f}"
            axis.errorbar(x, y, [y - low, high - y], marker="o", capsize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds per round")
        if what == "actors":
            axis.set_xticks(x, [f"{value:g}" for value in x])
            axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--output", type=Path, help="folder; default docs, with --quick .bench/quick")
    args = parser.parse_args()
    output = args.output or (ROOT / ".bench" / "quick" if args.quick else ROOT / "docs")
    output.mkdir(parents=True, exist_ok=True)
    os.environ.update({**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE)))})
    with connected(address="local", num_cpus=4):  # room for four actors on any machine
        done: list[dict[str, Any]] = []
        loads = [os.getloadavg()[0]]
        for name, varied, cases in sweeps(args.quick, ROOT / ".bench" / ("files-quick" if args.quick else "files")):
            points = []
            for x, workload, workers in cases:
                seconds = round_seconds(workload, workers)
                points.append((x, median(seconds), min(seconds), max(seconds)))
                loads.append(os.getloadavg()[0])
                print(f"{name}: {x:g} {varied}: {1e3 * median(seconds):.4g} ms", flush=True)
            middle = [(x, seconds) for x, seconds, *_ in points]
            fixed, each = line(middle)
            fit = {"exponent": exponent(middle), "last": exponent(middle[-2:]), "fixed": fixed, "each": each}
            done.append({"name": name, "varied": varied, "points": points, **fit})
            load = f"{min(loads):.1f} to {max(loads):.1f}"
            found = {"date": date.today().isoformat(), "machine": machine(), "load": load, "sweeps": done}
            (output / "growth.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (output / "growth.md").write_text(page(found), encoding="utf-8")
    draw(found, output / "growth.svg")


if __name__ == "__main__":
    main()
