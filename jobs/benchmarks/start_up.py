"""Measure how long `fedray run` takes to its first round, and what its processes hold meanwhile.

    python jobs/benchmarks/start_up.py [REPEATS [CONFIG [section.key=value]...]]

Six clients of a tiny Llama on two client actors, or the experiment of CONFIG, as a program of its own, with the fork
server and without it (`FEDRAY_FORK_SERVER=0`), in turn. Prints for each repeat the seconds until the first round is
recorded and those until the program ends after this one round. Then it prints the proportional set size (PSS) by kind
of process, in MB, three seconds after the first of many rounds; PSS counts 1/n of a page that n processes share in each
of them. Takes some minutes, on Linux.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from subprocess import DEVNULL
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import NamedTuple

import psutil

TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}
CONFIG = {
    "name": "start-up",
    "rounds": 1,
    "method": ["fedavg"],
    "model": {"path": "random", "tokenizer": "bytes", "config": TINY | HEADS},
    "data": {"source": "synthetic", "examples_per_client": 24, "classes": 2, "groups": 1},
    "partition": {"kind": "by_file"},
    "clients": {"count": 6, "actors": 2},
    "lora": {"rank": 2},
    "train": {"max_steps": 1},
    "evaluation": {"every": 0},
    "device": "cpu",
}
WAYS = {"one by one": {"FEDRAY_FORK_SERVER": "0"}, "from the fork server": {}}
MANY = 100_000
"""Rounds of a run that is looked at and then ended."""


class Measured(NamedTuple):
    """first: seconds until the first round is recorded. whole: until the program ended. memory: PSS by kind, in MB."""

    first: float
    whole: float
    memory: Mapping[str, float]


def measured(variables: Mapping[str, str], own: Sequence[str] = (), look: bool = False) -> Measured:
    """Run the experiment once.

    Args:
        variables: of the environment.
        own: another experiment's file and overrides.
        look: measure memory during a long run, and end it.
    """
    with TemporaryDirectory() as folder:
        file, run = Path(folder) / "config.json", Path(folder) / "run"
        file.write_text(json.dumps(CONFIG))
        what = [*(own or [str(file)]), f"rounds={MANY if look else 1}"]
        command = [sys.executable, "-m", "fedray", "run", *what, "--output", str(run)]
        begun = monotonic()
        program = psutil.Popen(command, env={**os.environ, **variables}, stdout=DEVNULL, stderr=DEVNULL)
        while not (run / "rounds.parquet").exists():
            if program.poll() is not None:
                sys.exit(f"{' '.join(command)} ended with {program.returncode}")
            sleep(0.01)
        first, memory = monotonic() - begun, {}
        if look:
            sleep(3)
            memory = held(program)
            program.terminate()
        program.wait()
        return Measured(first, monotonic() - begun, memory)


def held(program: psutil.Process) -> dict[str, float]:
    """Return the PSS of a program's processes by kind, in MB."""
    found: Counter[str] = Counter()
    for process in (program, *program.children(recursive=True)):
        try:
            words, size = " ".join(process.cmdline()), process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
        if process.pid == program.pid:
            found["the program"] += size
        elif "forking.py" in words:
            found["the fork server and the run"] += size
        else:
            found[
                "driver and client actors"
                if words.startswith(("ray::DriverActor", "ray::ClientActor"))
                else "Ray's own"
            ] += size
    return dict(found)


def main(repeats: str = "3", *own: str) -> None:
    times: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for _ in range(int(repeats)):
        for way, variables in WAYS.items():
            times[way].append(found := measured(variables, own))
            print(f"{way}: first round after {found.first:.1f} s, end after {found.whole:.1f} s", flush=True)
    for way, variables in WAYS.items():
        first, whole = (median(one[part] for one in times[way]) for part in (0, 1))
        memory = measured(variables, own, look=True).memory
        print(f"{way}: median {first:.1f} and {whole:.1f} s; {sum(memory.values()):.0f} MB")
        print("".join(f"  {size:6.0f} MB  {kind}\n" for kind, size in memory.items()), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
