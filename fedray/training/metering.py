"""The memory that a process really uses, and how much of a GPU it may use.

On a CPU, a worker keeps blocks that it freed (`process_memory`), and the allocator cannot merge all of them: the peak
is up to 50 % above what was in use at one time. With MALLOC_MMAP_THRESHOLD_=131072 in the environment the allocator
releases them immediately; steps take up to 70 % longer.

The system counts a page that n processes share as 1/n of a page for each (PSS), so a process's PSS changes whenever
another one starts or ends that has the same libraries. What a method takes is therefore counted by what only the
process itself changes: its anonymous memory, and the pages of weights that it has read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from fedray.training.process_memory import c_function

CUDA_CONTEXT = 600_000_000
"""Bytes of a GPU that every process takes before its first tensor (context, kernels, cuBLAS); an allowance."""

NOTE_EVERY_S = 2.0
"""Seconds between readings of the host's peak."""
PROCESS = Path("/proc/self")
WEIGHTS = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ .* (/.*\.safetensors)(?: \(deleted\))?$"
    r"(?s:.*?)^Rss: +(\d+) kB$(?s:.*?)^Anonymous: +(\d+) kB$",
    re.MULTILINE,
)
"""A file that weights are mapped from, as /proc/self/smaps describes it: its resident kB, and those that the process
has written to."""


@dataclass(frozen=True)
class BareProcess:
    """What a process has of the host's memory without its method's model, but with all that is imported, in bytes.

    Attributes:
        anonymous: what is no file's: allocated by the process, or by the one it was forked from, which may share it.
        pss: all its memory except Ray's object store; a page that n processes share counts 1/n.
    """

    anonymous: int
    pss: int

    def with_imports(self, size: int) -> "BareProcess":
        """Return what it has after it imported more.

        Args:
            size: bytes of anonymous memory that this took.
        """
        return BareProcess(self.anonymous + size, self.pss + size)


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one process since its method was set up, in bytes.

    Attributes:
        device: cuda or cpu.
        device_peak: the most that torch had allocated on the GPU; None on a CPU.
        host_peak: the most that the process had of the host's memory beyond the bare process: its anonymous memory and
            the weights that it has read from mapped files. Such weights count in full, even if other processes map
            them too. Ray's object store does not count.
        host_baseline: PSS of the bare process.
        held_elsewhere: weights on the GPU that another process holds for all; not in device_peak.
    """

    device: str
    device_peak: int | None
    host_peak: int
    host_baseline: int
    held_elsewhere: int = 0


class MemoryMeter:
    """Measures a process's memory from the meter's creation on.

    `note` is called at the end of every client task. Later would be too late: results are written into Ray's object
    store, whose pages in this process cannot be told from those of the peak, and make it look smaller.

    Args:
        device: cuda or cpu.
        bare: the process without its method; None: as it is now.
    """

    def __init__(self, device: str, bare: BareProcess | None = None) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.bare = bare_process() if bare is None else bare
        _reset_host_peak()
        self._anonymous_peak = 0
        self._noted = -NOTE_EVERY_S

    def note(self) -> None:
        """Record the host's peak since the last record.

        Reading it takes some milliseconds, so it is read every few seconds only: the system keeps the peak meanwhile.
        """
        if monotonic() - self._noted >= NOTE_EVERY_S:
            self._note()
            self._noted = monotonic()

    def read(self) -> MemoryUse:
        """Return the peaks so far."""
        self._note()
        device_peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        host_peak = max(self._anonymous_peak - self.bare.anonymous, 0) + mapped_weights()
        return MemoryUse(self.device, device_peak, host_peak, self.bare.pss)

    def _note(self) -> None:
        self._anonymous_peak = max(self._anonymous_peak, anonymous_peak())
        _reset_host_peak()


def anonymous_peak() -> int:
    """Return the process's peak of anonymous memory since the last reset, in bytes: what it has now, and how much
    larger its whole memory was at its peak."""
    status = _fields(PROCESS / "status")
    return _fields(PROCESS / "smaps_rollup")["Anonymous"] + status["VmHWM"] - status["VmRSS"]


def mapped_weights() -> int:
    """Return the bytes of weights that this process has read from files that it maps; a file that is mapped several
    times counts once."""
    read: dict[str, int] = {}
    for file, resident, written in WEIGHTS.findall((PROCESS / "smaps").read_text(errors="replace")):
        read[file] = max(read.get(file, 0), 1024 * (int(resident) - int(written)))
    return sum(read.values())


def bare_process() -> BareProcess:
    """Return freed memory to the system (with glibc only), then return what the process has."""
    if (trim := c_function("malloc_trim")) is not None:
        trim(0)
    rollup = _fields(PROCESS / "smaps_rollup")
    return BareProcess(rollup["Anonymous"], rollup["Pss"] - rollup.get("Pss_Shmem", 0))


def cap_gpu_memory(share: float, held_elsewhere: int = 0) -> None:
    """Limit this process to its share of its GPU, so that actors on one GPU never take each other's.

    Args:
        share: of one GPU; nothing is limited if it is 0, or 1 or more, or if there is no GPU.
        held_elsewhere: bytes that another process holds for all actors of the GPU: the share is of the rest.
    """
    if 0 < share < 1 and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        rest = shared_gpu(total, held_elsewhere)
        torch.cuda.set_per_process_memory_fraction(max(share * rest - CUDA_CONTEXT, 0.0) / total)


def shared_gpu(total: int, held_elsewhere: int) -> int:
    """Return the bytes of a GPU that remain for actors beside processes that hold weights for all of them.

    Args:
        total: of the GPU.
        held_elsewhere: bytes of the weights; 0: there is no such process.
    """
    return total - held_elsewhere - CUDA_CONTEXT if held_elsewhere else total


def gpu_memory() -> int | None:
    """Return the bytes of its GPU that this process may take: its share of the whole (`cap_gpu_memory`), and no more
    than other processes leave; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    share = torch.cuda.get_per_process_memory_fraction()
    return min(int(share * total), free + torch.cuda.memory_reserved())


def _reset_host_peak() -> None:
    """5 sets VmHWM to VmRSS; where a sandbox forbids it, the peak counts from the process's start."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def _fields(path: Path) -> dict[str, int]:
    """Return the lines `Name:  123 kB` of a file of /proc, in bytes."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = 1024 * int(value.removesuffix("kB"))
    return found
