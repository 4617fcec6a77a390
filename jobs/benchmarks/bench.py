"""The benchmark suite: every contender on every row, interleaved; writes a JSON file and a page.

    python jobs/benchmarks/bench.py [W0 W3 A1 ...] [--quick] [--repeats 3] [--contenders fedray flwr] [--output docs]

Words choose the rows that begin with them. With --quick everything is tiny and is written below .bench.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from contenders import HERE, ROOT, Contender, contenders, machine, place_versions
from measure import Failed, Measurement, measure
from table import entry, page
from workloads import Workload, make_files, rows

WORK = ROOT / ".bench"
MEMORY_ROUNDS = 5


def measure_row(workload: Workload, chosen: list[Contender], repeats: int) -> dict[str, Any]:
    """Return the row's entry: a run of each contender for its memory, then `repeats` runs of each in turns."""
    make_files(workload)
    failed: dict[str, str] = {}
    memory: dict[str, Measurement] = {}
    timed: dict[str, list[Measurement]] = {contender.name: [] for contender in chosen}
    for repeat in range(-1, repeats):
        turn = repeat % len(chosen)
        for contender in chosen[turn:] + chosen[:turn]:
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
    entries = {name: entry(workload, timed[name], memory[name]) for name in timed if name not in failed}
    return {"contenders": entries, "failed": failed}


def measure_kernels(which: str, quick: bool, repeats: int) -> dict[str, Any]:
    """Return the entries of A1 or A2 by row; one run per repeat has both ways in it."""
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


def place(loads: list[float], versions: Mapping[str, str]) -> dict[str, Any]:
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "-"
    return {"date": date.today().isoformat(), "machine": machine(), "versions": dict(versions), "load": load}


def save(results: Mapping[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "benchmarks.md").write_text(page(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="rows that begin with one of these; default all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=[""], help="those whose name begins with one of these")
    parser.add_argument("--output", type=Path, help="folder; default docs, with --quick .bench/quick")
    args = parser.parse_args()
    output = args.output or (WORK / "quick" if args.quick else ROOT / "docs")
    file = output / "benchmarks.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": {}, "kernels": {}}
    wanted = tuple(args.rows) or ("",)
    versions = place_versions(WORK)
    for workload in rows(args.quick, WORK / ("files-quick" if args.quick else "files")).values():
        chosen = [c for c in contenders(workload, WORK) if c.name.startswith(tuple(args.contenders))]
        if workload.row.startswith(wanted) and chosen:
            measured = measure_row(workload, chosen, args.repeats)
            loads = [load for found in measured["contenders"].values() for load in found["load"]]
            results["rows"][workload.row] = {**measured, "place": place(loads, versions)}
            save(results, output)
    for which in ("A1", "A2"):
        if which.startswith(wanted):
            for row, found in measure_kernels(which, args.quick, args.repeats).items():
                results["kernels"][row] = {**found, "place": place(found["load"], versions)}
            save(results, output)


if __name__ == "__main__":
    main()
