"""What a process keeps of freed memory, counted in page faults: they do not depend on how fast the machine is."""

import os
import platform
import subprocess
import sys

import pytest

MEGABYTE_BLOCKS = """
import ctypes, resource, sys
PR_SET_THP_DISABLE = 41  # a huge page would be one fault
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
from fedray.training.process_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    blocks = [bytearray(1_000_000) for _ in range(30)]
    for block in blocks:
        block[::4096] = b"1" * len(block[::4096])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""

STEP_PAGES = 30 * 1_000_000 // 4096

ALLOCATORS = ("MALLOC_", "GLIBC_TUNABLES", "PYTHONMALLOC", "LD_PRELOAD")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults_per_step(what: str, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(ALLOCATORS)}
    shown = subprocess.run(
        [sys.executable, "-c", MEGABYTE_BLOCKS, what],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout)


@pytest.fixture(scope="module", autouse=True)
def faults_are_counted() -> None:
    given_back = faults_per_step("leave", MALLOC_MMAP_THRESHOLD_="131072")
    if given_back < STEP_PAGES / 2:
        pytest.skip(f"{given_back} page faults are counted here where {STEP_PAGES} new pages are touched")


def test_a_step_finds_the_memory_of_the_last_one() -> None:
    assert faults_per_step("keep") < STEP_PAGES / 50


def test_what_the_environment_says_stays() -> None:
    assert faults_per_step("keep", MALLOC_MMAP_THRESHOLD_="131072") > STEP_PAGES / 2
