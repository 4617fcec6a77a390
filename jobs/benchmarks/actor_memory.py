"""Measure the memory of each further client actor on a node, for a small and a large base model that actors map.

    python jobs/benchmarks/actor_memory.py

Prints the proportional set size (PSS) of all client actors in the second round, in MB, for one to three actors. PSS
counts 1/n of a page that n processes share in each of them. The last column is what `fedray plan` predicts for an
actor's own memory at its peak: adapter, gradients, optimizer, activations. Takes five minutes, on Linux.
"""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

import fedray
from fedray.config import load_config
from fedray.experiment.prepare import prepare
from fedray.federation.events import Callback, RoundFinished

MODELS = {"3 million": (256, 4), "227 million": (1536, 8)}
"""Hidden size and number of layers of a Llama decoder, by its number of parameters."""

MOST_ACTORS = 3


def config(hidden: int, layers: int, actors: int) -> dict[str, Any]:
    decoder = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": 8 * hidden // 3}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8}
    return {
        "name": "actor-memory",
        "rounds": 2,
        "method": ["fedavg"],
        "model": {"path": "random", "tokenizer": "bytes", "config": decoder | heads},
        "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 32},
        "partition": {"kind": "by_file"},
        "clients": {"count": 6, "actors": actors, "num_cpus": 0.5},
        "lora": {"rank": 8, "targets": ["q_proj", "v_proj"]},
        "train": {"batch_size": 2, "max_steps": 2},
        "evaluation": {"every": 0},
        "device": "cpu",
    }


def sizes() -> list[int]:
    """Return the PSS of each client actor in this process's cluster, in bytes, without Ray's object store."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if "ray::ClientActor" in "".join(process.cmdline()):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
            found.append(1024 * (kilobytes["Pss"] - kilobytes.get("Pss_Shmem", 0)))
    return found


def measured(settings: dict[str, Any]) -> float:
    """Return the total memory of all client actors at the end of the second round, in MB."""
    found: list[int] = []

    class Sizes(Callback):
        def on_round_finished(self, event: RoundFinished) -> None:
            if event.server_round == 1 and not event.final:
                found.extend(sizes())

    with TemporaryDirectory() as folder:
        fedray.run(settings, output=Path(folder) / "run", callbacks=[Sizes()])
    assert len(found) == settings["clients"]["actors"]
    return sum(found) / 1e6


def own(settings: dict[str, Any]) -> float:
    """Return the predicted peak memory of an actor without its process and the base weights, in MB."""
    prepared = prepare(load_config(settings))
    return prepared.footprint(prepared.config.method[0], "default").private(on_gpu=False) / 1e6


def main() -> None:
    for name, (hidden, layers) in MODELS.items():
        totals = [measured(config(hidden, layers, actors)) for actors in range(1, MOST_ACTORS + 1)]
        further = [after - before for before, after in pairwise(totals)]
        print(f"{name} parameters: {', '.join(f'{total:,.0f}' for total in totals)} MB;", end=" ")
        print(f"each further actor {', '.join(f'{more:,.0f}' for more in further)} MB", end=", ")
        print(f"of its own at its peak by prediction {own(config(hidden, layers, 1)):,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
