"""Measures rows, with all contenders interleaved, and returns their entries of the JSON file."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from tempfile import TemporaryDirectory
from typing import Any

from contenders import HERE, ROOT, Contender, machine
from measure import Failed, Measurement, measure
from table import entry
from workloads import Workload, make_files

MEMORY_ROUNDS = 2


def measure_row(workload: Workload, chosen: Sequence[Contender], repeats: int) -> dict[str, Any]:
    """Return the row's entry: one run per contender for its memory, then `repeats` interleaved runs for its time."""
    make_files(workload)
    failed: dict[str, str] = {}
    memory: dict[str, Measurement] = {}
    timed: dict[str, list[Measurement]] = {contender.name: [] for contender in chosen}
    for repeat in range(-1, repeats):
        first = repeat % len(chosen)
        for contender in (*chosen[first:], *chosen[:first]):
            if contender.name in failed:
                continue
            short = workload.shortened(MEMORY_ROUNDS) if repeat < 0 and not workload.row.startswith("S") else workload
            try:
                found = measure(contender.command(short), contender.paths, 0.25 if repeat < 0 else None)
            except Failed as error:
                print(error, file=sys.stderr, flush=True)
                failed[contender.name] = "failed"
                continue
            memory |= {contender.name: found} if repeat < 0 else {}
            timed[contender.name] += [found] if repeat >= 0 else []
            print(f"{workload.row}: {contender.name}: {1000 * found.round_s / workload.per_round:.4g} ms", flush=True)
    entries: dict[str, Any] = {}
    for name in timed.keys() - failed.keys():
        try:
            entries[name] = entry(workload, timed[name], memory[name])
        except ValueError as error:
            failed[name] = str(error)
    return {"contenders": {name: entries[name] for name in timed if name in entries}, "failed": failed}


def measure_kernels(which: str, quick: bool, repeats: int) -> dict[str, Any]:
    """Return the entries of A1 or A2 by row; each repeat is one run that times both computations."""
    command = [sys.executable, str(HERE / "aggregation_rows.py"), which, "quick" if quick else "full"]
    runs = [measure(command, [ROOT, HERE], None) for _ in range(repeats)]
    found: dict[str, Any] = {}
    for run in runs:
        for kernel in run.facts["kernels"]:
            own = found.setdefault(kernel["row"], {"seconds": [], "direct": [], "load": [], "note": kernel["note"]})
            own["seconds"].append(kernel["seconds"])
            own["direct"].append(kernel["direct"])
            own["load"].append(run.load)
            print(f"{kernel['row']}: {kernel['seconds']:.4g} s, directly {kernel['direct']:.4g} s", flush=True)
    return found


def measure_reliability(workload: Workload, chosen: Sequence[Contender]) -> dict[str, Any]:
    """Return the entry of W5 or W6: each contender's number of updates per round, and a hash of its final state."""
    make_files(workload)
    found: dict[str, Any] = {}
    for contender in chosen:
        with TemporaryDirectory() as folder:
            mark = folder if contender.name.endswith("a worker dies") else ""
            try:
                run = measure(contender.command(replace(workload, dies=mark)), contender.paths, None)
                facts = run.facts
                found[contender.name] = {"updates": facts["updates"], "sha256": facts["sha256"], "load": [run.load]}
            except Failed as error:
                print(error, file=sys.stderr, flush=True)
                found[contender.name] = {"failed": "ended with an error", "load": []}
        print(f"{workload.row}: {contender.name}: {found[contender.name]}", flush=True)
    return {"asked": workload.per_round, "contenders": found}


def place(loads: list[float], versions: Mapping[str, str]) -> dict[str, Any]:
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "-"
    return {"date": date.today().isoformat(), "machine": machine(), "versions": dict(versions), "load": load}
