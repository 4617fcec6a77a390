"""One frozen base model and one adapter, serving many virtual clients one after another. Plain Python: `ClientActor`
is this class as a Ray actor, and the inline runtime calls it directly."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_head, draw_lora, draw_mixer, draw_reft
from fedray.adapters.heads import float_head, head_group, label_text_head
from fedray.adapters.stacked import AdapterStack, CannotBatch
from fedray.config import Config, MethodConfig, TierConfig
from fedray.data.shards import Shard
from fedray.errors import ConfigError
from fedray.evaluation.metrics import configured_metric
from fedray.federation.update_checks import Expected
from fedray.methods.protocol import Initial, Update
from fedray.methods.registry import build_method
from fedray.models.attention import train_short_in_float32
from fedray.models.backbone import checkpoint_activations, load_backbone, meta_backbone, missing_head
from fedray.models.tokenizer import load_tokenizer
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import num_bytes
from fedray.training.batched import EQUAL_PARTS, TIMED_STEPS, WIDTHS, BatchedBackend, run_batched, width_seconds
from fedray.training.deepspeed import compile_extensions
from fedray.training.engine import TorchEngine, make_engine
from fedray.training.metering import MemoryMeter, MemoryUse, resting_memory
from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup
from fedray.training.process_memory import keep_freed_memory
from fedray.training.threads import set_threads
from fedray.training.trainer import ClientBackend, ClientReport, EngineBackend, LocalTrainer
from fedray.training.training_context import TrainingContext
from fedray.types import Client, Vector

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know to serve one method on one tier: all that is the same for its clients and rounds.

    folder: the run's, which all nodes see; None: nothing can be kept, for trials. uplink: what updates look like; None:
    anything.
    """

    config: Config
    entry: MethodConfig
    architecture: PretrainedConfig
    label_names: tuple[str, ...]
    pad_token_id: int
    tier: str = "default"
    folder: StoragePath | None = None
    uplink: Expected | None = None


Keep = Literal["state", "adapter", "nothing"]


@dataclass(frozen=True)
class ClientTask:
    """One client's turn. Its downlink, state and shard come beside it.

    measure: whether to evaluate before and after training. keep: what is kept of the turn: the client's next `state`
    (a round), the trained `adapter` that it takes home, or `nothing` (a trial). position: its place in the round's
    order of its tier, by which what it sends is added up.
    """

    client: Client
    server_round: int
    measure: bool
    keep: Keep = "state"
    position: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a client's turn brought, without its new state. tensors: the trained adapter by name, if asked for."""

    update: Update[Any]
    report: ClientReport
    uplink_bytes: int
    downlink_bytes: int
    tensors: Mapping[str, Vector] | None


class Worker:
    """Serves one method at a time; `setup` again for the next one.

    process_group: the processes that train with this one, if its clients are silos of several.
    """

    def __init__(self, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self._process_group = process_group
        keep_freed_memory()
        self._stack: AdapterStack | None = None
        self._told: set[str] = set()

    def setup(self, job: WorkerSetup) -> None:
        """Map the base weights, attach the method's adapter, and forget the method before."""
        if (last := vars(self).get("engine")) is not None:
            last.close()
        for name in ("engine", "adapter", "method", "_initial"):  # two base models at once may not fit
            vars(self).pop(name, None)
        self._stack = None
        config, self._job = job.config, job
        set_threads(config.clients.threads)
        resting = resting_memory()
        tier = config.clients.tier(job.tier)
        self.device = resolve_device(config, tier)
        sections = config.section_for(job.entry, job.tier)
        self.method = build_method(config, job.entry, job.tier)
        self._meter = self._metered(tier, resting)
        model = _load_model(job, tier, self.device)
        generating = configured_metric(config.evaluation, config.task).reads == "texts"
        texts = sections.head == "frozen_label_text" and config.task == "classification"
        tokenizer = load_tokenizer(config.model) if generating or texts else None
        # The label texts are embedded before the adapter is attached: by the backbone alone.
        # And by the one of the common type: a tier's own precision would give its clients another head.
        reference = _load_model(job, TierConfig(share=1.0), self.device) if tier.precision is not None else model
        texts_head = label_text_head(reference, tokenizer, job.label_names) if texts else None
        head = first_head(reference, config.seed) if texts_head is None else texts_head
        self.adapter = self.method.attach(model)
        self.training_context = TrainingContext(
            task=config.task,
            train=sections.train,
            seed=config.seed,
            pad_token_id=job.pad_token_id,
            evaluation=config.evaluation,
            device=self.device,
            tokenizer=tokenizer if generating else None,
        )
        self._initial = draw_initial(self.adapter, config.seed, head)
        for name in self.adapter.names:  # methods load what they train; what is frozen for all stays as loaded here
            self.adapter.load(name, self._initial.vectors[name])
        self.engine = make_engine(self.adapter, sections.train, tier, self.device, self._process_group)

    def memory(self) -> MemoryUse:
        """Return what this process took at most since `setup`."""
        return self._meter.read()

    def initial(self) -> Initial:
        """Return the common starting point, whatever part of it this tier holds; the same on every worker."""
        job = self._job
        method = build_method(job.config, job.entry)
        if method == self.method:
            return self._initial
        whole = method.attach(meta_backbone(job.architecture, job.config.task))
        if {name: whole.layout(name) for name in whole.names} == self._initial.layouts:
            return self._initial
        return draw_initial(whole, job.config.seed, self._initial.head())

    def train(self, assignment: ClientTask, downlink: Any, state: Any, shard: Shard) -> tuple[Outcome, Any]:
        """Run one client's turn. state: its private state, None on its first turn.

        Returns: the outcome and the client's next state.
        """
        return self._turn(assignment, downlink, state, shard, EngineBackend(self.engine, self.training_context))

    def train_many(
        self,
        assignments: Sequence[ClientTask],
        downlinks: Sequence[Any],
        states: Sequence[Any],
        shards: Sequence[Shard],
    ) -> Iterator[tuple[Outcome, Any]]:
        """Run several clients' turns, in one step each where that is possible (`fedray.training.batched`), else one
        after another. Results are those of `train` up to float rounding, which depends on who is trained together.

        Yields: outcomes and next states, in the order of the assignments.
        """
        turns = list(zip(assignments, downlinks, states, shards, strict=True))
        try:
            if len(turns) > 1:
                yield from self._together(turns)
                return
        except CannotBatch as reason:
            if str(reason) not in self._told:
                self._told.add(str(reason))
                log.warning("tier %s: clients are trained one by one: %s", self._job.tier, reason)
        for turn in turns:
            yield self.train(*turn)

    def width_seconds(
        self,
        assignments: Sequence[ClientTask],
        downlinks: Sequence[Any],
        states: Sequence[Any],
        shards: Sequence[Shard],
    ) -> dict[int, float]:
        """Return the seconds that the first steps of all these clients take, by how many are trained together; of 1
        only where no other number is possible. Nothing is kept of what they trained.

        Args:
            assignments: of typical clients, as many as an actor serves in a round, or as are worth timing. Tried are
                powers of two, and widths that cut these into equal parts.
        """
        turns = list(zip(assignments, downlinks, states, shards, strict=True))
        widths = {*WIDTHS, *(math.ceil(len(turns) / parts) for parts in EQUAL_PARTS)}
        training_context, train = self.training_context, self.training_context.train
        steps = min(TIMED_STEPS, train.max_steps or TIMED_STEPS)
        self.training_context = replace(training_context, train=train.model_copy(update={"max_steps": steps}))

        def serve(start: int, stop: int) -> object:
            return self.train(*turns[start]) if stop - start == 1 else self._together(turns[start:stop])

        try:
            return width_seconds(serve, len(turns), sorted(widths))
        except CannotBatch:
            return {1: math.inf}
        finally:
            self.training_context = training_context

    def _together(self, turns: Sequence[tuple[ClientTask, Any, Any, Shard]]) -> list[tuple[Outcome, Any]]:
        if not isinstance(self.engine, TorchEngine):
            raise CannotBatch("the engine is not plain torch")
        if self._process_group.size > 1:
            raise CannotBatch("several processes train one client")
        if self._stack is None or self._stack.members < len(turns):
            self._stack = AdapterStack(self.adapter, len(turns))

        def piece(turn: tuple[ClientTask, Any, Any, Shard]) -> Callable[[BatchedBackend], tuple[Outcome, Any]]:
            return lambda lane: self._named_turn(*turn, lane)

        return run_batched(self._stack, self.training_context, self.engine.loss_scale, [piece(turn) for turn in turns])

    def _named_turn(self, assignment: ClientTask, *turn: Any) -> tuple[Outcome, Any]:
        """Of several clients, an error must say whose it is."""
        try:
            return self._turn(assignment, *turn)
        except Exception as error:
            error.add_note(f"client {assignment.client.id!r}, round {assignment.server_round}")
            raise

    def _turn(
        self, assignment: ClientTask, downlink: Any, state: Any, shard: Shard, work: ClientBackend
    ) -> tuple[Outcome, Any]:
        client = assignment.client
        trainer = LocalTrainer(work, shard, client, assignment.server_round, self.training_context, assignment.measure)
        before = self.method.init_client(self._initial, client) if state is None else state
        payload, after = self.method.train_client(work.adapter, before, downlink, trainer)
        self._meter.note()
        outcome = Outcome(
            update=Update(client, shard.num_examples(), payload),
            report=trainer.report,
            uplink_bytes=num_bytes(payload),
            downlink_bytes=num_bytes(downlink),
            tensors=work.adapter.tensors() if assignment.keep == "adapter" else None,
        )
        return outcome, after

    def _metered(self, tier: TierConfig, resting: int) -> MemoryMeter:
        """Return a meter whose baseline is the bare process with all that was imported for this method and those before
        it. Memory that they freed and the allocator kept is not part of it: this method may use it again.

        resting: what the process had before this method was built.
        """
        if tier.engine == "deepspeed":
            compile_extensions(tier.offload, self.device)
        self.method.attach(meta_backbone(self._job.architecture, self._job.config.task))
        now = resting_memory()
        last: MemoryMeter | None = vars(self).get("_meter")
        return MemoryMeter(self.device, now if last is None else last.baseline + max(now - resting, 0))


def first_head(model: PreTrainedModel, seed: int) -> Vector | None:
    """Return the model's own task head with what its checkpoint lacked drawn; None where it has none."""
    head = head_group(model)
    if head is None:
        return None
    std = getattr(model.config, "initializer_range", 0.02)
    return draw_head(head.layout, head.read(), missing_head(model), seed, std)


def draw_initial(adapter: Adapter, seed: int, head: Vector | None) -> Initial:
    """Return the first values of the adapter's groups, drawn by seed; frozen second branches are zero. Layouts suffice:
    the adapter may be that of a model on the meta device.

    head: the first task head, where there is one.
    """
    layouts = {name: adapter.layout(name) for name in adapter.names}
    draws = {"lora": draw_lora, "mixer": draw_mixer, "reft": draw_reft}
    vectors = {
        name: draws[name](layout, seed) if name in draws else np.zeros(layout.size, np.float32)
        for name, layout in layouts.items()
    }
    if "full" in layouts:
        vectors["full"] = adapter.read("full")  # the model itself
    return Initial(seed, layouts, vectors if head is None else vectors | {"head": head})


def _load_model(job: WorkerSetup, tier: TierConfig, device: str) -> PreTrainedModel:
    """Return the frozen base model as the tier's devices hold it.

    Raises:
        ConfigError: float16 where there is no GPU, or checkpointing that the model does not support.
    """
    section, architecture = job.config.model, held_architecture(job.architecture, tier)
    if tier.precision is not None:
        section = section.model_copy(update={"dtype": tier.precision})
    if section.dtype == "float16" and device == "cpu":
        raise ConfigError(f"tier {job.tier!r}: float16 needs a GPU; on a CPU use bfloat16 or float32")
    # ZeRO-3 moves parameters to the device one by one: the whole model may be larger than that.
    place = device if tier.offload.params == "none" else "cpu"
    cache = job.config.data.cache_dir
    return as_held(load_backbone(section, architecture, job.config.task, job.config.seed, place, cache), tier, device)


def held_architecture(architecture: PretrainedConfig, tier: TierConfig) -> PretrainedConfig:
    """Return the architecture with the type in which the tier's devices hold the base weights."""
    held = copy.deepcopy(architecture)
    if tier.precision is not None:
        held.dtype = getattr(torch, tier.precision)
    return held


def as_held(model: PreTrainedModel, tier: TierConfig, device: str) -> PreTrainedModel:
    """Return the base model, changed in place, as the tier's devices compute with it.

    device: cuda or cpu, where they compute.

    Raises:
        ConfigError: checkpointing that the model does not support.
    """
    float_head(model)
    if device == "cpu":
        train_short_in_float32(model)
    if tier.activation_checkpointing:
        checkpoint_activations(model)
    return model


def resolve_device(config: Config, tier: TierConfig) -> str:
    """Return cuda or cpu; `auto` means cuda where this process has a GPU and its clients are not told to do without."""
    if config.device != "auto":
        return config.device
    return "cuda" if tier.num_gpus != 0 and torch.cuda.is_available() else "cpu"
