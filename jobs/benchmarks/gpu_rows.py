"""Measures rows of gpu.py, which starts this program.

    python gpu_rows.py TASK RESULT

TASK is JSON with the rows, their sizes, the device and a folder. A line of JSON is appended to RESULT for every row:
what was measured, or the exception that ended it.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from gpu import Sizes
from torch import Tensor, nn

from fedray.config import load_config
from fedray.experiment.calibration import calibrated
from fedray.experiment.prepare import Prepared, prepare
from fedray.federation.local_pool import LocalPool
from fedray.federation.tasks import ClientTask, downlinks_of
from fedray.federation.worker import Worker
from fedray.models.backbone import held_elsewhere
from fedray.training.base_model import load_base_model
from fedray.training.metering import BareProcess, MemoryMeter, MemoryUse, bare_process

RANK, ALPHA, TARGETS, LR = 8, 16, ["q_proj", "v_proj"], 1e-3
THREADS = 4
"""Of a process whose optimizer is on the host, as an actor of fedray's has."""
PRODUCTS = 10
"""Matrix products that are timed at once."""


@dataclass(frozen=True, eq=False)  # by identity: what is kept for a row is kept for this instance
class Bench:
    """What all rows of this process share."""

    sizes: Sizes
    device: str
    folder: Path

    @cached_property
    def bare(self) -> BareProcess:
        """The bare process, when this is first asked for."""
        return bare_process()

    @property
    def clients(self) -> int:
        """Number of clients: more than are trained in one step, to see how many would fit."""
        return 2 * max(self.sizes.widths)

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the median time of a call; the first one warms up."""
        found = []
        for _ in range(self.sizes.repeats + 1):
            self.wait()
            started = perf_counter()
            call()
            self.wait()
            found.append(perf_counter() - started)
        return median(found[1:])

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def batches(self, batch: int) -> list[Tensor]:
        """Return the tokens of one client's steps."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.sizes.steps, batch, self.sizes.tokens)
        tokens = torch.randint(3, self.sizes.decoder["vocab_size"], shape, generator=generator)
        return list(tokens.to(self.device))

    def decoder(self) -> nn.Module:
        """Return the frozen decoder with random weights, drawn on the device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = dict(self.sizes.decoder)
        torch.manual_seed(0)
        with torch.device(self.device):
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.requires_grad_(False)

    def settings(self, batch: int, **clients: Any) -> dict[str, Any]:
        """Return the configuration of an experiment with the same clients as the plain loop's."""
        return {
            "name": "gpu",
            "rounds": 2,
            "task": "causal_lm",
            "method": "fedavg",
            "model": {
                "path": "random",
                "tokenizer": "bytes",
                "config": dict(self.sizes.decoder),
                "dtype": "bfloat16",
            },
            "data": {"source": "files", "files": {"train": str(self.texts())}, "prompt": "", "answer": "{text}"}
            | {"max_length": self.sizes.tokens, "cache_dir": str(self.folder / "cache")},
            "partition": {"kind": "by_column", "column": "client", "min_examples": 1}
            | {"validation_fraction": 0, "test_fraction": 0},
            "clients": {"count": self.clients, **clients},
            "lora": {"rank": RANK, "alpha": ALPHA, "targets": TARGETS},
            "train": {"batch_size": batch, "max_steps": self.sizes.steps, "lr": LR, "clip": None},
            "evaluation": {"every": 0},
            "device": self.device,
            "runtime": "inline",
        }

    def texts(self) -> Path:
        """Write a text of as many tokens as a sequence has, for every example of every client, unless the file exists;
        return the file."""
        file, examples = self.folder / "texts.parquet", self.sizes.steps * max(self.sizes.batches)
        if not file.exists():
            shape = (self.clients * examples, self.sizes.tokens - 2)  # the tokenizer adds a first and a last token
            letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, shape, np.uint8)
            owners = np.repeat([f"c{client:03d}" for client in range(self.clients)], examples)
            pd.DataFrame({"client": owners, "text": [row.tobytes().decode() for row in letters]}).to_parquet(file)
        return file


@dataclass(frozen=True)
class Serving:
    """A worker that is ready for fedavg."""

    prepared: Prepared
    pool: LocalPool
    worker: Worker
    federation: Any

    def tasks(self, width: int) -> list[ClientTask]:
        clients, federation = self.prepared.clients[:width], self.federation
        downlinks = downlinks_of(federation.method.configure_train(federation.server, clients), clients)
        shards = self.prepared.data.shards
        return [ClientTask(c, 0, downlinks[c.id], measure=False, keep="nothing", shard=shards[c.id]) for c in clients]

    def train(self, width: int) -> None:
        results = list(self.worker.train_together(self.tasks(width)))
        assert all(np.isfinite(result.report.train_loss) for result in results)

    def predicted(self, settings: dict[str, Any], device: str) -> int:
        """Return the predicted bytes where `peak` counts them, with these settings for the same data."""
        changed = replace(self.prepared, config=load_config(settings))
        footprint = changed.footprint(changed.config.method[0], self.prepared.clients[0].tier)
        return footprint.device.total if device == "cuda" else footprint.host(on_gpu=False)


def serving(settings: dict[str, Any]) -> Serving:
    prepared = prepare(load_config(settings))
    entry = prepared.config.method[0]
    pool = LocalPool(prepared.data.shards)
    federation = prepared.federation(entry, pool.setup(prepared.worker_setups(entry)), pool)
    (worker,) = pool.workers.values()
    return Serving(prepared, pool, worker, federation)


def matrix_rate(bench: Bench) -> dict[str, Any]:
    size = bench.sizes.matrix
    one, other = torch.randn(2, size, size, device=bench.device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(PRODUCTS):
            one @ other

    rate = PRODUCTS * 2 * size**3 / bench.seconds(products)
    device = torch.cuda.get_device_name() if bench.device == "cuda" else "a CPU"
    return {"rate": rate, "device": device, "note": f"{rate / 1e12:.3g} TFLOP/s"}


def peak(use: MemoryUse) -> int:
    """Return the bytes of the device's peak; on a CPU, of the process beyond the bare one."""
    return use.host_peak if use.device_peak is None else use.device_peak


@lru_cache(maxsize=1)
def plain_model(bench: Bench) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    section = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS)
    model: nn.Module = get_peft_model(bench.decoder(), section)  # type: ignore[arg-type]
    return model.train()


def plain_loop(bench: Bench, batch: int) -> dict[str, Any]:
    meter = MemoryMeter(bench.device, bench.bare)
    model, batches = plain_model(bench), bench.batches(batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def client() -> None:
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        for tokens in batches:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return {"client_ms": 1000 * bench.seconds(client), "peak": peak(meter.read()), "parameters": _count(model)}


@lru_cache(maxsize=1)
def fused_serving(bench: Bench, batch: int) -> Serving:
    found = serving(bench.settings(batch))
    gc.collect()  # the one before
    return found


def fedavg(bench: Bench, batch: int, width: int | None = None) -> dict[str, Any]:
    """Time clients in one step.

    Args:
        width: number of clients; None: as many as `fuse: auto` finds.
    """
    bare = bench.bare
    served, found = fused_serving(bench, batch), {}
    if width is None:
        asked = replace(served.prepared, config=load_config(bench.settings(batch, fuse="auto")))
        width = calibrated(asked, served.pool).config.clients.tier("default").fuse_width
        found["note"] = f"fuse: auto found {width}"
    meter = MemoryMeter(bench.device, bare)
    seconds = bench.seconds(lambda: served.train(width))
    settings = bench.settings(batch, fuse=width if width > 1 else "off")
    return found | {
        "client_ms": 1000 * seconds / width,
        "peak": peak(meter.read()),
        "predicted": served.predicted(settings, bench.device),
        "parameters": _count(served.worker.adapter.model),
    }


def engine(bench: Bench, offload: Any) -> dict[str, Any]:
    """Time a client with an engine.

    Args:
        offload: of engine deepspeed; None: engine torch.
    """
    tier = {} if offload is None else {"engine": "deepspeed", "offload": offload}
    settings = bench.settings(bench.sizes.engine_batch, tiers={"all": {"share": 1, **tier}})
    served = serving(settings)
    seconds = bench.seconds(lambda: served.train(1))
    used = peak(served.worker.memory())
    return {"client_ms": 1000 * seconds, "peak": used, "predicted": served.predicted(settings, bench.device)}


def plain_deepspeed(bench: Bench, offload: dict[str, str], sized: bool = True) -> dict[str, Any]:
    """Time a client's steps with DeepSpeed's own engine on the same model.

    Args:
        sized: with fedray's limits by the size of the model; otherwise with DeepSpeed's.
    """
    from fedray.adapters.lora import attach_lora
    from fedray.config import LoraSection, TrainConfig
    from fedray.training.deepspeed_engine import compile_extensions
    from fedray.training.engines.deepspeed import OffloadConfig, engine_config
    from fedray.training.threads import set_threads
    from fedray.training.zero_sizes import fill_in_sizes

    meter = MemoryMeter(bench.device)
    set_threads(THREADS if bench.device == "cuda" else 1)
    section, train = OffloadConfig(**offload), TrainConfig(batch_size=bench.sizes.engine_batch, clip=None)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        "nccl" if bench.device == "cuda" else "gloo", store=store, rank=0, world_size=1
    )
    compile_extensions(section, bench.device)
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    adapter = attach_lora(bench.decoder(), LoraSection(rank=RANK, alpha=ALPHA, targets=TARGETS))
    config = engine_config(train, section, {})
    if sized:
        fill_in_sizes(config["zero_optimization"], adapter)
    if section.params == "cpu":
        options = {"config_dict_or_path": config, "dtype": torch.bfloat16, "remote_device": "cpu", "pin_memory": True}
        deepspeed.zero.Init(module=adapter.model, **options)
    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    optimizer = DeepSpeedCPUAdam(trained, lr=LR)
    trainer, *_ = deepspeed.initialize(model=adapter.model, optimizer=optimizer, config=config)
    trainer.train()
    if bench.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()  # the decoder was drawn on the device
    batches = bench.batches(bench.sizes.engine_batch)

    def client() -> None:
        for tokens in batches:
            trainer.backward(trainer(input_ids=tokens, labels=tokens, use_cache=False).loss)
            trainer.step()

    return {"client_ms": 1000 * bench.seconds(client), "peak": peak(meter.read())}


def three_tiers(bench: Bench) -> dict[str, Any]:
    """Run two rounds on Ray: two actors with plain torch, one with ZeRO-2, one with ZeRO-3, each on a quarter of the
    GPU."""
    import fedray
    from fedray.federation.events import Callback, RoundFinished

    ends: list[float] = []

    class Rounds(Callback):
        def on_round_finished(self, event: RoundFinished) -> None:
            ends.append(perf_counter())

    where = {"num_cpus": 0.5} | ({"num_gpus": 0.25} if bench.device == "cuda" else {})
    deepspeed = {"engine": "deepspeed", "actors": 1, **where}
    tiers = {
        "strong": {"share": 0.5, "actors": 2, **where},
        "laptop": {"share": 0.25, "offload": {"optimizer": "cpu"}, **deepspeed},
        "phone": {"share": 0.25, "offload": {"params": "cpu"}, **deepspeed},
    }
    settings = bench.settings(bench.sizes.engine_batch, count=4, tiers=tiers)
    settings |= {"runtime": "ray", "evaluation": {"every": 0, "final": "aggregated"}}
    started = perf_counter()
    result = fedray.run(settings, output=bench.folder / "run", callbacks=[Rounds()])
    which = "device" if bench.device == "cuda" else "host"
    peaks = [
        f"{row.tier} {row[f'measured_{which}'] / 2**30:.3g} GiB (predicted {row[f'predicted_{which}'] / 2**30:.3g})"
        for _, row in result.memory().iterrows()
    ]
    seconds = {"first_round_s": ends[0] - started, "later_round_s": ends[1] - ends[0]}
    note = f"first round after {seconds['first_round_s']:.3g} s, the next {seconds['later_round_s']:.3g} s; peaks: "
    return {**seconds, "note": note + ", ".join(peaks)}


def shared_base(bench: Bench) -> dict[str, Any]:
    """Load the base model from the process that holds it for all actors: the first time that process starts; then its
    tensors are compared with the file's, and what a further model takes of the device is seen."""
    prepared = prepare(load_config(bench.settings(1)))
    setup = next(iter(prepared.worker_setups(prepared.config.method[0]).values()))
    tier = prepared.config.clients.tier(setup.tier)
    load = partial(load_base_model, prepared.config, setup.architecture, setup.tier, tier, bench.device)
    own = load()
    started = perf_counter()
    first = load(share=True)
    starting = perf_counter() - started
    for (name, one), (_, two) in zip(first.state_dict().items(), own.state_dict().items(), strict=True):
        assert torch.equal(one, two), f"{name} is not what the file has"
    before = torch.cuda.mem_get_info()[0] if bench.device == "cuda" else 0
    started = perf_counter()
    second = load(share=True)
    mapping = perf_counter() - started
    assert held_elsewhere(second) > 0, "no holder could be reached; the log says why"
    taken = before - torch.cuda.mem_get_info()[0] if bench.device == "cuda" else 0
    held = f"{held_elsewhere(second) / 2**30:.3g} GiB are held once; a further model takes {taken / 2**30:.3g} GiB"
    return {"note": f"{held} and {mapping:.3g} s; the first one {starting:.3g} s"}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    call.__name__: call for call in (matrix_rate, plain_loop, fedavg, engine, plain_deepspeed, three_tiers, shared_base)
}


def main(text: str, result: str) -> None:
    task = json.loads(text)
    bench = Bench(Sizes(**task["sizes"]), task["device"], Path(task["folder"]))
    for row in task["rows"]:
        try:
            found = MEASURES[row["measure"]](bench, **row["options"])
        except Exception as error:  # the next rows may do better
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        with Path(result).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": row["name"], **found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
