"""The measured peak of a process, and the part of a GPU that it is held to."""

import gc
import mmap
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedray.training import metering
from fedray.training.metering import (
    CUDA_CONTEXT,
    MemoryMeter,
    bare_process,
    cap_gpu_memory,
    gpu_memory,
    mapped_weights,
)

SIZE = 300_000_000
"""Bytes; a process that has run many tests changes by some megabytes at any time."""


def touch(size):
    """Take memory, write to all of it, give it back: past the allocator, which may keep what it has."""
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1


@pytest.fixture(autouse=True)
def tidy():
    """Nothing that earlier tests left, like a mapped file, is freed during a test."""
    gc.collect()


def test_a_peak_that_is_over_is_seen():
    meter = MemoryMeter("cpu")
    before = meter.read()
    touch(SIZE)
    after = meter.read()
    assert after.host_peak - before.host_peak == pytest.approx(SIZE, rel=0.1)
    assert (after.host_baseline, after.device, after.device_peak) == (meter.bare.pss, "cpu", None)


def test_a_new_meter_knows_nothing_of_what_was_before():
    """Between two methods; the baseline remains that of the bare process."""
    first = MemoryMeter("cpu")
    touch(SIZE)
    assert first.read().host_peak > 0.9 * SIZE
    second = MemoryMeter("cpu", first.bare)
    assert second.read().host_peak < 0.5 * SIZE
    assert second.read().host_baseline == first.bare.pss


@pytest.mark.parametrize("every", [0.0, 1e6])
def test_the_largest_of_all_turns_counts(every, monkeypatch):
    """Whether all of them are looked at or only the first."""
    monkeypatch.setattr(metering, "NOTE_EVERY_S", every)
    meter = MemoryMeter("cpu")
    touch(SIZE)
    meter.note()
    touch(SIZE // 3)
    meter.note()
    assert meter.read().host_peak == pytest.approx(SIZE, rel=0.1)


def test_processes_with_the_same_libraries_change_nothing():
    """Three that have torch too: where there were no others, this process's PSS falls by tens of MB."""
    pages = bare_process()
    meter = MemoryMeter("cpu", pages)
    command = [sys.executable, "-c", "import torch; print(flush=True); input()"]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for other in others:
            assert other.stdout.readline()
        touch(SIZE)
        now = bare_process()
        use = meter.read()
    finally:
        for other in others:
            other.communicate(b"\n")
    assert abs(now.anonymous - pages.anonymous) < 5e6
    assert (use.host_baseline, use.host_peak) == (pages.pss, pytest.approx(SIZE, rel=0.1))


def test_mapped_weights_count_in_full_when_they_are_read(tmp_path):
    """Other processes may map them too. Read, mapped a second time, and written to, which makes them the process's own;
    the file's end and header are not weights."""
    size = SIZE // 2
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(size // 4)}, file)
    before = mapped_weights()
    weight, again = load_file(file)["weight"], load_file(file)["weight"]
    assert mapped_weights() - before < size / 10
    weight.sum()
    assert mapped_weights() - before == pytest.approx(size, rel=0.1)
    again.sum()
    file.unlink()
    assert mapped_weights() - before == pytest.approx(size, rel=0.1)
    meter = MemoryMeter("cpu")
    weight.zero_()
    again.zero_()
    use = meter.read()
    assert use.host_peak == pytest.approx(2 * size, rel=0.1)
    assert mapped_weights() - before < size / 10


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU of 10 CUDA contexts; the fractions that were set."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=10 * CUDA_CONTEXT)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    return fractions


def test_a_part_of_a_gpu_is_a_cap(gpu):
    """Torch's fraction does not count the context, a tenth of this GPU: four actors of a quarter fill it exactly."""
    cap_gpu_memory(0.25)
    assert gpu == [pytest.approx(0.15)]
    cap_gpu_memory(0.05)  # less than a context: nothing is left, and the first tensor says so
    assert gpu[1] == 0


def test_a_part_is_of_what_a_common_base_model_leaves(gpu):
    """Four of ten contexts are weights that another process holds, and one is its own: a fifth of five is one, which
    is the actor's context; of two fifths, one remains."""
    cap_gpu_memory(0.2, 4 * CUDA_CONTEXT)
    cap_gpu_memory(0.4, 4 * CUDA_CONTEXT)
    assert gpu == [pytest.approx(0), pytest.approx(0.1)]


@pytest.mark.parametrize("share", [0, 1, 2])
def test_whole_gpus_and_none_are_not_capped(gpu, share):
    cap_gpu_memory(share)
    assert gpu == []


def test_nothing_is_capped_without_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cap_gpu_memory(0.5)
    assert gpu == []


@pytest.mark.parametrize(
    ("share", "free", "reserved", "room"),
    [
        (1.0, 70, 10, 80),  # another process has 20
        (0.15, 70, 10, 15),
        (0.25, 4, 10, 14),
    ],
)
def test_the_room_on_a_gpu_is_the_share_that_others_leave(gpu, monkeypatch, share, free, reserved, room):
    """Of 100 bytes, of which this process has reserved some."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: share)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    assert gpu_memory() == room
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory() is None


def test_a_gpus_peak_is_torchs(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    use = MemoryMeter("cuda").read()
    assert (use.device, use.device_peak, reset) == ("cuda", 12345, [True])


def test_a_sandbox_that_forbids_the_reset(monkeypatch, tmp_path):
    """The peak then counts from the process's start: 100 kB of PSS now, of which 30 are the object store's; 50 kB more
    memory at the peak, and 40 kB of weights, of which the process has written to 8."""
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  250 kB\nVmRSS:\t  200 kB\n")
    (tmp_path / "smaps_rollup").write_text(
        "55-7f ---p 00000000 00:00 0  [rollup]\nRss:  200 kB\nPss:  100 kB\nPss_Shmem:   30 kB\nAnonymous:   80 kB\n"
    )
    rest = "Pss:   1 kB\nAnonymous:    {} kB\nVmFlags: rd mr\n"
    (tmp_path / "smaps").write_text(
        f"55-57 r--p 00000000 fe:00 26 /usr/lib/libtorch.so\nSize:  90 kB\nRss:   90 kB\n{rest.format(0)}"
        f"57-58 rw-p 00000000 fe:00 27 /a b/model.safetensors\nSize:  60 kB\nRss:   40 kB\n{rest.format(8)}"
        f"58-7f rw-p 00000000 00:00 0 \nSize:  20 kB\nRss:   20 kB\n{rest.format(20)}"
    )
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    monkeypatch.setattr(metering, "PROCESS", tmp_path)
    use = MemoryMeter("cpu").read()
    assert (use.host_baseline, use.host_peak) == (70 * 1024, (50 + 32) * 1024)
