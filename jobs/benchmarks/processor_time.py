"""Show where the processor time of a row goes: milliseconds per client and process, after the first round.

    python jobs/benchmarks/processor_time.py ROW WORKERS ROUNDS [bare]

With `bare` it runs the plain loop instead of fedray. The total of all processes divided by the number of cores is a
lower bound of the time per client; the rest is waiting.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import NamedTuple

import psutil
from contenders import HERE, ROOT
from measure import ENVIRONMENT
from workloads import make_files, rows

EVERY_S = 0.25


class Seen(NamedTuple):
    """What a process has used so far. user, system: seconds. faults: minor page faults."""

    name: str
    user: float
    system: float
    faults: int
    preempted: int


def look(program: psutil.Process) -> dict[int, Seen]:
    """Return what each process of the tree has used, without processes that end meanwhile."""
    found = {}
    for process in (program, *program.children(recursive=True)):
        try:
            times, words = process.cpu_times(), process.cmdline()
            faults = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[7])
            preempted = process.num_ctx_switches().involuntary
        except (psutil.Error, OSError):
            continue
        found[process.pid] = Seen(_name(words), times.user, times.system, faults, preempted)
    return found


def _name(words: Sequence[str]) -> str:
    first = words[0] if words else "?"
    if first.startswith("ray::"):
        return first.split(".")[0]
    script = next((Path(word).name for word in words[1:] if word.endswith(".py")), "")
    return " ".join(filter(None, (Path(first).name, script)))


def shown(before: Mapping[int, Seen], after: Mapping[int, Seen], clients: int) -> None:
    print(f"{'process':40}{'user':>9}{'system':>9}{'faults':>9}{'preempted':>11}")
    for pid, last in sorted(after.items(), key=lambda entry: -entry[1].user):
        if pid in before:
            took = [(b - a) / clients for a, b in zip(before[pid][1:], last[1:], strict=True)]
            if took[0] + took[1] > 1e-6:
                print(f"{last.name[:39]:40}{1e3 * took[0]:9.3f}{1e3 * took[1]:9.3f}{took[2]:9.0f}{took[3]:11.1f}")


def main(row: str, workers: str, rounds: str, *bare: str) -> None:
    workload = replace(rows(False, ROOT / ".bench" / "files")[row], rounds=int(rounds))
    make_files(workload)
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        script = HERE / ("bare_loop.py" if bare else "with_fedray.py")
        command = [sys.executable, str(script), workload.to_json(), workers, str(result)]
        program = psutil.Popen(command, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL)
        history = []
        while program.poll() is None:
            history.append((monotonic(), look(program)))
            sleep(EVERY_S)
        if program.returncode:
            sys.exit(f"{script.name} ended with {program.returncode}")
        ends = json.loads(result.read_text())["ends"]
    begin, end = (next(seen for at, seen in reversed(history) if at <= moment) for moment in (ends[0], ends[-1]))
    clients = workload.per_round * (len(ends) - 1)
    print(f"{row}: {1e3 * (ends[-1] - ends[0]) / clients:.3f} ms per client")
    shown(begin, end, clients)


if __name__ == "__main__":
    main(*sys.argv[1:])
