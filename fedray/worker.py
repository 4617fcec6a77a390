"""One frozen base model and one adapter, serving many virtual clients one after another. Plain Python: `ClientActor`
is this class as a Ray actor, and the inline runtime calls it directly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from fedray.adapters.draws import draw_head, draw_lora, draw_mixer, draw_reft
from fedray.adapters.heads import label_text_head
from fedray.config import Config, MethodConfig
from fedray.data.shards import Shard
from fedray.evaluation.metrics import GENERATED
from fedray.methods.protocol import Initial, Update
from fedray.methods.registry import build_method
from fedray.models.backbone import load_backbone, missing_head
from fedray.models.tokenizer import load_tokenizer
from fedray.state import num_bytes
from fedray.training.engine import TorchEngine
from fedray.training.setting import Setting
from fedray.training.threads import set_threads
from fedray.training.trainer import ClientReport, LocalTrainer
from fedray.types import Client, Vector


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to serve one method: everything that is the same for all clients and rounds."""

    config: Config
    entry: MethodConfig
    architecture: PretrainedConfig
    label_names: tuple[str, ...]
    pad_token_id: int


@dataclass(frozen=True)
class Assignment:
    """One client's turn. Its downlink, state and shard travel beside it, as references.

    measure: whether to evaluate before and after training. keep: whether to return the trained adapter's tensors.
    """

    client: Client
    server_round: int
    measure: bool
    keep: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a client's turn brought, without its new state. tensors: the trained adapter by name, if asked for."""

    update: Update[Any]
    report: ClientReport
    uplink_bytes: int
    downlink_bytes: int
    tensors: Mapping[str, Vector] | None


class Worker:
    """Serves one method at a time; `setup` again for the next one."""

    def setup(self, job: Job) -> None:
        """Map the base weights, attach the method's adapter, and forget the method before."""
        for name in ("engine", "adapter", "method", "_initial"):  # two base models at once may not fit
            vars(self).pop(name, None)
        config = job.config
        set_threads(config.clients.threads)
        self.device = resolve_device(config)
        sections = config.section_for(job.entry)
        self.method = build_method(config, job.entry)
        model = load_backbone(
            config.model, job.architecture, config.task, config.seed, self.device, config.data.cache_dir
        )
        generating = config.evaluation.metric in GENERATED
        texts = sections.head == "frozen_label_text" and config.task == "classification"
        tokenizer = load_tokenizer(config.model) if generating or texts else None
        # The label texts are embedded before the adapter is attached: by the backbone alone.
        label_head = label_text_head(model, tokenizer, job.label_names) if texts else None
        self.adapter = self.method.attach(model)
        self.engine = TorchEngine(self.adapter)
        self.setting = Setting(
            task=config.task,
            train=sections.train,
            seed=config.seed,
            pad_token_id=job.pad_token_id,
            evaluation=config.evaluation,
            device=self.device,
            tokenizer=tokenizer if generating else None,
        )
        self._initial = self._draw_initial(config, label_head)
        for name in self.adapter.names:  # methods load what they train; what is frozen for all stays as loaded here
            self.adapter.load(name, self._initial.vectors[name])

    def initial(self) -> Initial:
        """Return the common starting point; the same on every worker."""
        return self._initial

    def train(self, assignment: Assignment, downlink: Any, state: Any, shard: Shard) -> tuple[Outcome, Any]:
        """Run one client's turn. state: its private state, None on its first turn.

        Returns: the outcome and the client's next state.
        """
        client = assignment.client
        trainer = LocalTrainer(self.engine, shard, client, assignment.server_round, self.setting, assignment.measure)
        before = self.method.init_client(self._initial, client) if state is None else state
        payload, after = self.method.train_client(self.adapter, before, downlink, trainer)
        outcome = Outcome(
            update=Update(client, shard.num_examples(), payload),
            report=trainer.report,
            uplink_bytes=num_bytes(payload),
            downlink_bytes=num_bytes(downlink),
            tensors=self.adapter.tensors() if assignment.keep else None,
        )
        return outcome, after

    def _draw_initial(self, config: Config, label_head: Vector | None) -> Initial:
        adapter, seed = self.adapter, config.seed
        layouts = {name: adapter.layout(name) for name in adapter.names}
        draws = {"lora": draw_lora, "mixer": draw_mixer, "reft": draw_reft}
        vectors = {
            name: draws[name](layout, seed) if name in draws else np.zeros(layout.size, np.float32)
            for name, layout in layouts.items()
        }
        if "head" in layouts:
            std = getattr(adapter.model.config, "initializer_range", 0.02)
            drawn = draw_head(layouts["head"], adapter.read("head"), missing_head(adapter.model), seed, std)
            vectors["head"] = drawn if label_head is None else label_head
        return Initial(seed, layouts, vectors)


def resolve_device(config: Config) -> str:
    """Return cuda or cpu; `auto` means cuda where this process has a GPU and its clients are not told to do without."""
    if config.device != "auto":
        return config.device
    return "cuda" if config.clients.num_gpus != 0 and torch.cuda.is_available() else "cpu"
