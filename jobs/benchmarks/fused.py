"""Time per client when several clients of one tier train in one step, compared with one by one.

    python jobs/benchmarks/fused.py [--profile WIDTH] [--precision bfloat16]

The model is a decoder of 4 layers, d 256 and a vocabulary of 2,000 with random weights, with LoRA of rank 8 on query
and value; clients take 8 AdamW steps on sequences of 32 tokens. The widths are interleaved and timed three times. For
each width the program prints the median CPU time per client on one thread, and the speed-up over one by one in the same
run. It also prints the rate of the task's matrix products over the whole time, as a share of the rate at which the same
thread multiplies two float32 matrices of 1,024 × 1,024. With a base model in bfloat16 that share can exceed 100 %.

With --profile it instead prints where the time of WIDTH clients in one step goes, by torch's operations.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fedray.config import load_config
from fedray.experiment.prepare import Prepared, prepare
from fedray.federation.local_pool import LocalPool
from fedray.federation.tasks import ClientTask, downlinks_of

CONFIG = Path(__file__).with_name("fused.yaml")
WIDTHS = (1, 2, 4, 8, 16)
REPEATS = 3
METHODS = ("fedavg", "fedalt")
BATCHES = (1, 2, 8)
OPERATIONS = 12
"""Number of operations that a profile lists."""


def seconds_per_client(prepared: Prepared, width: int, worker: Any, federation: Any) -> float:
    """Return the time of one joint task of `width` clients, divided by `width`."""
    clients = prepared.clients[:width]
    downlinks = downlinks_of(federation.method.configure_train(federation.server, clients), clients)
    shards = prepared.data.shards
    tasks = [ClientTask(c, 0, downlinks[c.id], measure=False, keep="nothing", shard=shards[c.id]) for c in clients]
    started = process_time()
    results = list(worker.train_together(tasks))
    assert all(np.isfinite(result.report.train_loss) for result in results)
    return (process_time() - started) / width


def matmul_rate() -> float:
    """Return the floating-point operations per second of CPU time of a large float32 product."""
    size, times = 1024, []
    one, other = torch.randn(2, size, size)
    for _ in range(25):
        started = process_time()
        one @ other
        times.append(process_time() - started)
    return 2 * size**3 / median(times)


def matmul_operations(prepared: Prepared, worker: Any, federation: Any) -> dict[Any, int]:
    """Return the floating-point operations of one client task, by kind of matrix product."""
    with FlopCounterMode(display=False) as counter:
        seconds_per_client(prepared, 1, worker, federation)
    return dict(counter.get_flop_counts()["Global"])


def workers(cache: str, precision: str) -> Iterator[tuple[str, Prepared, Any, Any]]:
    """Yield a label (method and batch size), the prepared experiment, a worker and the federation."""
    for method in METHODS:
        for batch_size in BATCHES:
            changes = {"method": method, "train.batch_size": batch_size, "model.dtype": precision}
            prepared = prepare(load_config(CONFIG, {**changes, "data.cache_dir": cache}))
            entry = prepared.config.method[0]
            pool = LocalPool(prepared.data.shards)
            federation = prepared.federation(entry, pool.setup(prepared.worker_setups(entry)), pool)
            (worker,) = pool.workers.values()
            yield f"{method}, batch {batch_size}", prepared, worker, federation


def compare(what: str, prepared: Prepared, worker: Any, federation: Any) -> None:
    operations = sum(matmul_operations(prepared, worker, federation).values())
    timed = [[seconds_per_client(prepared, w, worker, federation) for w in WIDTHS] for _ in range(REPEATS + 1)]
    middle = [median(times) for times in zip(*timed[1:], strict=True)]  # the first repeat warms up
    rate = matmul_rate()
    shown = ", ".join(
        f"{w}: {1e3 * t:.1f} ms ({middle[0] / t:.2f}x, {operations / t / rate:.0%})"
        for w, t in zip(WIDTHS, middle, strict=True)
    )
    print(f"{what}: {shown}; load {os.getloadavg()[0]:.1f}", flush=True)


def show_profile(what: str, width: int, prepared: Prepared, worker: Any, federation: Any) -> None:
    operations = matmul_operations(prepared, worker, federation)[torch.ops.aten.mm]
    for _ in range(2):
        seconds_per_client(prepared, width, worker, federation)  # warms up
    with profile() as profiler:
        for _ in range(REPEATS):
            seconds_per_client(prepared, width, worker, federation)
    found = sorted(profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    milliseconds = {entry.key: entry.self_cpu_time_total / 1e3 / REPEATS / width for entry in found}
    total = sum(milliseconds.values())
    rates = f"aten::mm at {operations / 1e6 / milliseconds['aten::mm']:.0f} of {matmul_rate() / 1e9:.0f} GFlop/s"
    print(f"{what}, {width} together: {total:.1f} ms per client; {rates}", flush=True)
    for name in list(milliseconds)[:OPERATIONS]:
        print(f"  {milliseconds[name] / total:6.1%}  {milliseconds[name]:7.2f} ms  {name}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--profile", type=int, metavar="WIDTH", choices=range(1, max(WIDTHS) + 1), help="clients in one step"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    asked = parser.parse_args()
    with TemporaryDirectory() as cache:
        for what, *served in workers(cache, asked.precision):
            if asked.profile is None:
                compare(what, *served)
            else:
                show_profile(what, asked.profile, *served)


if __name__ == "__main__":
    main()
