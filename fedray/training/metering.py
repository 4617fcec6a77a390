"""The memory that a process really uses, and how much of a GPU it may use.

On a CPU, a worker keeps blocks that it freed (`process_memory`), and the allocator cannot merge all of them: the peak
is up to 50 % above what was in use at one time. With MALLOC_MMAP_THRESHOLD_=131072 in the environment the allocator
releases them immediately; steps take 50 % longer.
"""

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


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one process since its method was set up, in bytes.

    Attributes:
        device: cuda or cpu.
        device_peak: the most that torch had allocated on the GPU; None on a CPU.
        host_peak: the most that the process had of the host's memory: its part of what it shares (PSS), and nothing of
            Ray's object store.
        host_baseline: what it has without its method's model, but with all that is imported.
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
        baseline: bytes that the process has without its method; None: what it has now.
    """

    def __init__(self, device: str, baseline: int | None = None) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.baseline = resting_memory() if baseline is None else baseline
        _reset_host_peak()
        self._host_peak = 0
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
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        return MemoryUse(self.device, peak, self._host_peak, self.baseline)

    def _note(self) -> None:
        self._host_peak = max(self._host_peak, host_peak())
        _reset_host_peak()


def host_peak() -> int:
    """Return the process's peak of PSS since the last reset, in bytes: PSS now, and what RSS was higher at its peak."""
    status = _fields(PROCESS / "status")
    return _proportional() + status["VmHWM"] - status["VmRSS"]


def resting_memory() -> int:
    """Return freed memory to the system (with glibc only), then return the process's PSS in bytes."""
    if (trim := c_function("malloc_trim")) is not None:
        trim(0)
    return _proportional()


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


def _proportional() -> int:
    """Return PSS without shared memory: Ray's object store is mapped into every process, and is counted separately."""
    fields = _fields(PROCESS / "smaps_rollup")
    return fields["Pss"] - fields.get("Pss_Shmem", 0)


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
