"""Check whether anything grows in a long run: memory of driver and actors, object store, open files, processes.

    python jobs/studies/long_run.py [rounds] [clients] [method]

The default is 300 rounds of 50 tiny clients with FedALT, which keeps a state per client. The program measures all
processes of the run after every round and fits a line from round 20 on. It prints the slope per 100 rounds, its
standard error, and the level at round 20. A value grows if its slope per 100 rounds exceeds 1 % of the level, and its
slope exceeds three standard errors.
"""

import sys
from collections import Counter, defaultdict
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import ray

import fedray
from fedray.federation.events import Callback, RoundFinished

WARM_UP = 20
CONFIG = {
    "name": "long-run",
    "model": {
        "path": "random",
        "tokenizer": "bytes",
        "config": {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    },
    "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
    "partition": {"kind": "by_file"},
    "lora": {"rank": 2},
    "train": {"max_steps": 1},
    "evaluation": {"every": 0},
    "device": "cpu",
}


def look() -> dict[str, float]:
    """Return memory in MB and counts for the processes of the run, by kind of process."""
    found: Counter[str] = Counter()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            words = " ".join(process.cmdline())
            name = next((name for name in ("DriverActor", "ClientActor") if f"ray::{name}" in words), None)
            if process.pid == psutil.Process().pid:
                name = "caller"
            found["processes"] += 1
            if name is not None:
                found[f"{name}, MB"] += process.memory_full_info().pss / 1e6
                found[f"{name}, open files"] += process.num_fds()
        except psutil.Error:
            continue  # the process has just ended
    total, free = ray.cluster_resources(), ray.available_resources()
    found["object store, MB"] = (total["object_store_memory"] - free.get("object_store_memory", 0)) / 1e6
    return dict(found)


def fit(rounds: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Return the slope per round, its standard error, and the value at the start of the line."""
    design = np.stack([rounds - rounds[0], np.ones(len(rounds))], axis=1)
    (slope, start), *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ [slope, start]
    error = np.sqrt(residual @ residual / (len(rounds) - 2) / np.square(rounds - rounds.mean()).sum())
    return float(slope), float(error), float(start)


def main(rounds: str = "300", clients: str = "50", method: str = "fedalt") -> None:
    seen: dict[str, list[float]] = defaultdict(list)

    class Looking(Callback):
        def on_round_finished(self, event: RoundFinished) -> None:
            if event.final:
                return
            for name, value in look().items():
                seen[name].append(value)
            if (event.server_round + 1) % 50 == 0:
                print(f"round {event.server_round + 1}", file=sys.stderr, flush=True)

    with TemporaryDirectory() as folder:
        fedray.run(
            CONFIG,
            rounds=int(rounds),
            method=method,
            clients={"count": int(clients), "actors": 2, "num_cpus": 1},
            output=f"{folder}/run",
            callbacks=[Looking()],
        )
    print(f"{'':28}{'at round ' + str(WARM_UP):>14}{'per 100 rounds':>16}{'± error':>10}")
    for name, values in sorted(seen.items()):
        tail = np.array(values[WARM_UP:])
        slope, error, start = fit(np.arange(WARM_UP, WARM_UP + len(tail)), tail)
        grows = slope > 3 * error and 100 * slope > 0.01 * max(start, 1)
        print(f"{name:28}{start:14.1f}{100 * slope:16.2f}{100 * error:10.2f}{'  GROWS' if grows else ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
