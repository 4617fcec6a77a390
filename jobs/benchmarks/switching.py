"""Measure the cost of switching a live engine to another client, compared with building a new engine.

    python jobs/benchmarks/switching.py

The engines are those of the DeepSpeed tiers in jobs/three_tiers.yaml, with FedALT on all-MiniLM-L6-v2. One client
trains first, so that moments exist. A switch reads the adapter's values, loads another client's and resets the
optimizer. The program prints the median of 30 switches and its ratio to building the engine.
"""

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import fedray.federation.worker as worker_module
from fedray.config import load_config
from fedray.experiment.prepare import prepare
from fedray.training.loop import Train, train_steps
from fedray.training.schedule import Schedule

CONFIG = Path(__file__).parents[1] / "three_tiers.yaml"
make_engine = worker_module.make_engine
builds = []


def timed_make_engine(*arguments: Any) -> Any:
    started = perf_counter()
    engine = make_engine(*arguments)
    builds.append(perf_counter() - started)
    return engine


def switch(worker: worker_module.Worker) -> float:
    """Return the seconds that one switch takes."""
    adapter = worker.adapter
    others = {name: np.full(adapter.layout(name).size, 0.01, np.float32) for name in adapter.names}
    started = perf_counter()
    for name, values in others.items():
        adapter.read(name)
        adapter.load(name, values)
    worker.engine.begin(Schedule(worker.training_context.train, 1, 10), None)
    return perf_counter() - started


worker_module.make_engine = timed_make_engine
prepared = prepare(load_config(CONFIG, {"method": ["fedalt"]}))
table = max(prepared.data.shards.values(), key=lambda shard: shard.num_examples()).tables["train"]
for tier, setup in prepared.worker_setups(prepared.config.method[0]).items():
    if prepared.config.clients.tier(tier).engine.name == "deepspeed":
        for worker in (worker_module.Worker(), worker_module.Worker()):  # the first worker also imports DeepSpeed
            worker.setup(setup)
        train_steps(worker.engine, Train(table, "first", 0), worker.training_context)
        cost = median(switch(worker) for _ in range(30))
        print(f"{tier}: build {builds[-1]:.2f} s, switch {1000 * cost:.2f} ms, {100 * cost / builds[-1]:.2f} %")
