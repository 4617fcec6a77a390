"""The benchmark suite: measures every contender on every row, interleaved, and writes a JSON file and a page.

    python jobs/benchmarks/bench.py [W0 W3 A1 ...] [--quick] [--repeats 3] [--contenders fedray flwr] [--output docs]

A positional argument selects the row of that name, or else the rows that begin with it. Rows that are not measured keep
their entries in the JSON file. With --quick everything is tiny, and the output goes to a folder below .bench.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders import ROOT, contenders, place_versions, reliability_contenders
from suite import measure_kernels, measure_reliability, measure_row, place
from table import page
from workloads import reliability_rows, rows

WORK = ROOT / ".bench"
"""Folder of the peers' environments and the rows' files."""


def save(results: Mapping[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "benchmarks.md").write_text(page(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="rows that begin with one of these; default all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50, help="at most this many per repeat, at least 2; default all")
    parser.add_argument("--contenders", nargs="*", default=[""], help="those whose name begins with one of these")
    parser.add_argument("--without", nargs="*", default=[], help="and not those whose name has one of these in it")
    parser.add_argument("--output", type=Path, help="folder; default docs, with --quick .bench/quick")
    args = parser.parse_args()
    output = args.output or (WORK / "quick" if args.quick else ROOT / "docs")
    file = output / "benchmarks.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": {}, "kernels": {}}
    all_rows = rows(args.quick, WORK / ("files-quick" if args.quick else "files"))
    wanted = tuple(word for word in args.rows if word not in all_rows) if args.rows else ("",)
    for workload in all_rows.values():
        workload = workload.shortened(args.rounds)
        chosen = [c for c in contenders(workload, WORK) if c.name.startswith(tuple(args.contenders))]
        chosen = [c for c in chosen if not any(word in c.name for word in args.without)]
        if (workload.row in args.rows or workload.row.startswith(wanted)) and chosen:
            measured = measure_row(workload, chosen, args.repeats)
            loads = [load for found in measured["contenders"].values() for load in found["load"]]
            results["rows"][workload.row] = {**measured, "place": place(loads, place_versions(WORK))}
            save(results, output)
    for row, workload in reliability_rows(args.quick, WORK / ("files-quick" if args.quick else "files")).items():
        if row.startswith(wanted):
            who = reliability_contenders(workload, WORK)
            found = measure_reliability(workload, [c for c in who if c.name.startswith(tuple(args.contenders))])
            loads = [load for contender in found["contenders"].values() for load in contender["load"]]
            results.setdefault("reliability", {})[row] = {**found, "place": place(loads, place_versions(WORK))}
            save(results, output)
    for which in ("A1", "A2"):
        if which.startswith(wanted):
            for row, found in measure_kernels(which, args.quick, args.repeats).items():
                results["kernels"][row] = {**found, "place": place(found["load"], place_versions(WORK))}
            save(results, output)


if __name__ == "__main__":
    main()
