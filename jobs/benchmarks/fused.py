"""Seconds per client when several clients of one tier train in one step, against one by one.

    python jobs/benchmarks/fused.py

A decoder of 4 layers, d 256 and a vocabulary of 2,000 with random weights, LoRA of rank 8 on query and value, 8 AdamW
steps on sequences of 32 tokens. All widths are timed in turn, three times; printed is the median of each, in CPU time
of the only thread, its ratio to one by one in the same run, and how much of the rate at which the same thread
multiplies two matrices of 1,024 × 1,024 the turn's matrix products alone would make in that time.
"""

import os
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedray.config import load_config
from fedray.inline import InlinePool
from fedray.prepare import Prepared, prepare
from fedray.worker import Assignment

CONFIG = Path(__file__).with_name("fused.yaml")
WIDTHS = (1, 2, 4, 8, 16)
REPEATS = 3


def seconds_per_client(prepared: Prepared, width: int, worker: Any, federation: Any) -> float:
    """Return the time of one turn of `width` clients, divided by them."""
    clients = prepared.clients[:width]
    downlinks = federation.method.configure_train(federation.server, clients)
    assignments = [Assignment(client, 0, measure=False, keep="nothing") for client in clients]
    shards = [prepared.data.shards[client.id] for client in clients]
    started = process_time()
    done = list(worker.train_many(assignments, [downlinks[c.id] for c in clients], [None] * width, shards))
    assert all(np.isfinite(outcome.report.train_loss) for outcome, _ in done)
    return (process_time() - started) / width


def matmul_rate() -> float:
    """Return floating-point operations per second of CPU time."""
    size, times = 1024, []
    one, other = torch.randn(2, size, size)
    for _ in range(5):
        started = process_time()
        one @ other
        times.append(process_time() - started)
    return 2 * size**3 / median(times)


def matmul_operations(prepared: Prepared, worker: Any, federation: Any) -> int:
    """Return the floating-point operations of the matrix products in one client's turn."""
    with FlopCounterMode(display=False) as counter:
        seconds_per_client(prepared, 1, worker, federation)
    return int(counter.get_total_flops())


with TemporaryDirectory() as cache:
    for method in ("fedavg", "fedalt"):
        for batch_size in (1, 2, 8):
            changes = {"method": method, "train.batch_size": batch_size, "data.cache_dir": cache}
            prepared = prepare(load_config(CONFIG, changes))
            entry = prepared.config.method[0]
            pool = InlinePool(prepared.data.shards)
            federation = prepared.federation(entry, pool.setup(prepared.jobs(entry)), pool)
            (worker,) = pool.workers.values()
            operations = matmul_operations(prepared, worker, federation)
            timed = [[seconds_per_client(prepared, w, worker, federation) for w in WIDTHS] for _ in range(REPEATS + 1)]
            middle = [median(times) for times in zip(*timed[1:], strict=True)]  # the first turn warms up
            rate = matmul_rate()
            shown = ", ".join(
                f"{w}: {1e3 * t:.1f} ms ({middle[0] / t:.2f}x, {operations / t / rate:.0%})"
                for w, t in zip(WIDTHS, middle, strict=True)
            )
            print(f"{method}, batch {batch_size}: {shown}; load {os.getloadavg()[0]:.1f}", flush=True)
