"""One program as one measurement: run it alone, with one thread per process, and measure its whole process tree."""

import ctypes
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import psutil

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PFL_PYTORCH_DEVICE": "cpu",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every contender. `measure` removes RAY_ADDRESS, because each contender starts its own Ray."""

TIMEOUT_S = 3600.0
PR_SET_CHILD_SUBREAPER = 36


class Failed(Exception):
    """A contender ended without a result; the message contains the end of its output."""


@dataclass(frozen=True)
class Measurement:
    """The result of one run.

    Attributes:
        load: load average of the machine over the minute before.
        started, begun, ends: times on the monotonic clock: of the program's start, of the first round's start, and of
            the end of every round.
        sizes: (time, bytes of PSS of the process tree, of which the driver actor's); empty if memory was not measured.
    """

    load: float
    started: float
    begun: float
    ends: tuple[float, ...]
    sizes: tuple[tuple[float, int, int], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def startup_s(self) -> float:
        return self.begun - self.started

    @property
    def first_round_s(self) -> float:
        return self.ends[0] - self.begun

    @property
    def round_s(self) -> float:
        """Mean of all rounds except the first."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    @property
    def peak_bytes(self) -> int:
        return max(size for _, size, _ in self.sizes)

    def driver_bytes(self, share: float) -> int:
        """Return the driver actor's memory close to the time at which this share of the rounds had ended."""
        moment = self.ends[max(0, round(share * len(self.ends)) - 1)]
        alive = [size for size in self.sizes if size[2]]
        return min(alive, key=lambda size: abs(size[0] - moment))[2]


def measure(command: Sequence[str], paths: Sequence[Path], memory_every_s: float | None) -> Measurement:
    """Run `command RESULT` and return what it wrote to RESULT.

    Args:
        paths: folders for its imports.
        memory_every_s: seconds between two measurements of memory; None measures none, so that nothing else runs.

    Raises:
        Failed: the program ended with an error, took longer than an hour, or wrote nothing.
    """
    adopt_orphans()
    own = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    own.pop("RAY_ADDRESS", None)
    load, sizes = os.getloadavg()[0], []
    with TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
        result = Path(folder, "result.json")
        started = monotonic()
        process = subprocess.Popen([*command, str(result)], env=own, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and monotonic() - started < TIMEOUT_S:
                try:
                    process.wait(memory_every_s or 1.0)
                except subprocess.TimeoutExpired:
                    if memory_every_s is not None:
                        sizes.append((monotonic(), *tree_bytes()))
        finally:
            end_descendants()
        if process.poll() != 0 or not result.exists():
            output.seek(0)
            raise Failed(f"{' '.join(command)}: ended with {process.poll()}:\n{output.read()[-4000:]}")
        facts = json.loads(result.read_text(encoding="utf-8"))
    begun, ends = facts.pop("begun"), tuple(facts.pop("ends"))
    return Measurement(load, started, begun, ends, tuple(sizes), facts)


def tree_bytes() -> tuple[int, int]:
    """Return the PSS of all descendants of this process, and of the driver actor. Shared pages count once."""
    total = driver = 0
    for child in psutil.Process().children(recursive=True):
        try:
            lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
            size = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            total += size
            driver += size if "DriverActor" in " ".join(child.cmdline()) else 0
        except (OSError, StopIteration, psutil.Error):  # the process has just ended
            continue
    return total, driver


def adopt_orphans() -> None:
    """Make this process the parent of orphaned descendants, so that it can measure and kill them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill all descendants of this process, also those whose parents have ended (`adopt_orphans`): for a program that
    does nothing else."""
    left = psutil.Process().children(recursive=True)
    for child in left:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=30)
