"""The contenders of each row, and how each one starts."""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from environments import PEERS, environment, versions
from workloads import Workload

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORKERS = 2


@dataclass(frozen=True)
class Contender:
    """One framework or loop.

    Attributes:
        command: returns the command line for a workload, without the path of the result.
        paths: folders from which its program imports.
    """

    name: str
    command: Callable[[Workload], list[str]]
    paths: tuple[Path, ...] = (HERE,)


def contenders(workload: Workload, work: Path) -> list[Contender]:
    """Return a row's contenders in the order of the page.

    Args:
        work: folder of the peers' environments.
    """
    plain = [
        Contender("bare loop, 1 process", _program(lambda: sys.executable, "bare_loop.py", 1)),
        Contender("bare loop, 2 processes", _program(lambda: sys.executable, "bare_loop.py", WORKERS)),
    ]
    own = (ROOT, HERE)
    ours = [Contender("fedray", _program(lambda: sys.executable, "with_fedray.py", WORKERS), own)]
    if workload.kind == "lora":
        fused = _program(lambda: sys.executable, "with_fedray.py", WORKERS, options=("auto",))
        ours.append(Contender("fedray, fuse: auto", fused, own))
    flwr = Contender("flwr", _program(lambda: peer("flwr", work), "with_flwr.py", WORKERS))
    pfl = [
        Contender("pfl, 1 process", _program(lambda: peer("pfl", work), "with_pfl.py", 1)),
        Contender("pfl, 2 processes", _program(lambda: peer("pfl", work), "with_pfl.py", WORKERS, _TORCHRUN)),
    ]
    if workload.row.startswith("S"):
        return ours
    # With two processes, each process of pfl would know half of a client's history.
    return [*ours, *plain, flwr, *(pfl[:1] if workload.state else pfl)]


def reliability_contenders(workload: Workload, work: Path) -> list[Contender]:
    """Return the contenders of W5 (lost updates) or W6 (equal results). In W6 a process dies in the contenders whose
    name says so."""
    ours, theirs = _program(lambda: sys.executable, "with_fedray.py", 2), ("with_flwr.py", lambda: peer("flwr", work))
    if workload.row == "W5":
        return [
            Contender("fedray, a worker dies", ours, (ROOT, HERE)),
            Contender("flwr, a worker dies", _program(theirs[1], theirs[0], 2)),
        ]
    found = []
    for number in (1, 2, 4):
        one = _program(lambda: sys.executable, "with_fedray.py", number)
        found.append(Contender(f"fedray, {number} workers", one, (ROOT, HERE)))
    dying = _program(lambda: sys.executable, "with_fedray.py", 2, options=("driver-dies",))
    found.append(Contender("fedray, a worker dies", ours, (ROOT, HERE)))
    found.append(Contender("fedray, the driver dies", dying, (ROOT, HERE)))
    for number in (1, 2, 4):
        found.append(Contender(f"flwr, {number} workers", _program(theirs[1], theirs[0], number)))
    return [*found, Contender("flwr, 2 workers again", _program(theirs[1], theirs[0], 2))]


@cache
def peer(name: str, work: Path) -> str:
    """Return a peer's Python; create its environment if necessary."""
    return str(environment(name, work, ROOT / "constraints.txt"))


def place_versions(work: Path) -> dict[str, str]:
    """Return the versions of the compared packages; of the peers, those that are already installed."""
    found = {"python": platform.python_version(), **versions(sys.executable, ("torch", "transformers", "ray"))}
    for name in PEERS:
        python = work / name / "bin" / "python"
        if python.exists():
            own = versions(python, (name, "ray"))
            found |= {key if key == name else f"{name}'s {key}": value for key, value in own.items()}
    return found


def machine() -> str:
    """Return the number of cores that this process may use, the processor's name, and the memory."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} × {name}, {memory:.0f} GiB"


_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS))


def _program(
    python: Callable[[], str],
    file: str,
    workers: int,
    launcher: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> Callable[[Workload], list[str]]:
    return lambda workload: [python(), *launcher, str(HERE / file), workload.to_json(), str(workers), *options]
