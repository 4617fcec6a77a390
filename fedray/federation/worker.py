"""One frozen base model and one adapter, serving many virtual clients one after another. Plain Python: `ClientActor`
is this class as a Ray actor, and the inline runtime calls it directly."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_head
from fedray.adapters.heads import float_head, head_group, label_text_head
from fedray.adapters.stacked import AdapterStack, CannotBatch
from fedray.config import Config, TierConfig
from fedray.errors import ConfigError
from fedray.evaluation.metrics import configured_metric
from fedray.federation.tasks import ClientResult, ClientTask, WorkerSetup
from fedray.methods.protocol import AnyMethod, Initial
from fedray.methods.registry import build_method
from fedray.models.attention import train_short_in_float32
from fedray.models.backbone import checkpoint_activations, load_backbone, meta_backbone, missing_head
from fedray.models.tokenizer import load_tokenizer
from fedray.storage.state_tree import num_bytes
from fedray.training.batch_width import TIMED_STEPS, width_seconds, widths_to_time
from fedray.training.batched import BatchedBackend, run_batched
from fedray.training.engine import Engine, make_engine
from fedray.training.metering import MemoryMeter, MemoryUse, resting_memory
from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup
from fedray.training.process_memory import keep_freed_memory
from fedray.training.threads import set_threads
from fedray.training.torch_engine import loss_scale
from fedray.training.trainer import ClientBackend, EngineBackend, LocalTrainer
from fedray.training.training_context import TrainingContext
from fedray.types import Vector

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Served:
    """The method that a worker serves, and what was made for it."""

    method: AnyMethod
    adapter: Adapter
    engine: Engine
    initial: Initial


class Worker:
    """Serves one method at a time; `setup` again for the next one.

    process_group: the processes that train with this one, if its clients are silos of several.
    """

    def __init__(self, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self._process_group = process_group
        keep_freed_memory()
        self._stack: AdapterStack | None = None
        self._told: set[str] = set()
        self._served: _Served | None = None
        self._meter: MemoryMeter | None = None

    def setup(self, job: WorkerSetup) -> None:
        """Map the base weights, attach the method's adapter, and forget the method before."""
        if self._served is not None:
            self._served.engine.close()
        self._served = self._stack = None  # before anything is loaded: two base models at once may not fit
        config, self._job = job.config, job
        set_threads(config.clients.threads)
        resting = resting_memory()
        tier = config.clients.tier(job.tier)
        self.device = resolve_device(config, tier)
        sections = config.section_for(job.entry, job.tier)
        method = build_method(config, job.entry, job.tier)
        self._meter = self._metered(method, tier, resting)
        model = _load_model(job, tier, self.device)
        generating = configured_metric(config.evaluation, config.task).reads == "texts"
        texts = sections.head == "frozen_label_text" and config.task == "classification"
        tokenizer = load_tokenizer(config.model) if generating or texts else None
        # The label texts are embedded before the adapter is attached: by the backbone alone.
        # And by the one of the common type: a tier's own precision would give its clients another head.
        reference = _load_model(job, TierConfig(share=1.0), self.device) if tier.precision is not None else model
        texts_head = label_text_head(reference, tokenizer, job.label_names) if texts else None
        head = first_head(reference, config.seed) if texts_head is None else texts_head
        adapter = method.attach(model)
        self.training_context = TrainingContext(
            task=config.task,
            train=sections.train,
            seed=config.seed,
            pad_token_id=job.pad_token_id,
            evaluation=config.evaluation,
            device=self.device,
            tokenizer=tokenizer if generating else None,
        )
        initial = draw_initial(adapter, config.seed, head)
        for name in adapter.names:  # methods load what they train; what is frozen for all stays as loaded here
            adapter.load(name, initial.vectors[name])
        engine = make_engine(adapter, sections.train, tier, self.device, self._process_group)
        self._served = _Served(method, adapter, engine, initial)

    @property
    def method(self) -> AnyMethod:
        """The method that is served."""
        return self._serving.method

    @property
    def adapter(self) -> Adapter:
        """Its adapter, on this worker's base model."""
        return self._serving.adapter

    @property
    def engine(self) -> Engine:
        """What trains the adapter."""
        return self._serving.engine

    @property
    def _initial(self) -> Initial:
        return self._serving.initial

    @property
    def _serving(self) -> _Served:
        if self._served is None:
            raise RuntimeError("setup() comes first")
        return self._served

    def memory(self) -> MemoryUse:
        """Return what this process took at most since `setup`."""
        if self._meter is None:
            raise RuntimeError("setup() comes first")
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

    def train(self, task: ClientTask) -> ClientResult:
        """Run one client's task.

        Returns:
            The result, with the client's next state and, if the task keeps it, the trained adapter.
        """
        return self._run(task, EngineBackend(self.engine, self.training_context))

    def train_together(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Run several clients' tasks, in one step each where that is possible (`fedray.training.batched`), else one
        after another. Results are those of `train` up to float rounding, which depends on who is trained together.

        Yields:
            The results, in the order of the tasks.
        """
        try:
            if len(tasks) > 1:
                yield from self._batched(tasks)
                return
        except CannotBatch as reason:
            if str(reason) not in self._told:
                self._told.add(str(reason))
                log.warning("tier %s: clients are trained one by one: %s", self._job.tier, reason)
        for task in tasks:
            yield self.train(task)

    def width_seconds(self, tasks: Sequence[ClientTask]) -> dict[int, float]:
        """Return the seconds that the first steps of all these clients take, by how many are trained together; of 1
        only where no other number is possible. Nothing is kept of what they trained.

        Args:
            tasks: of typical clients, as many as an actor serves in a round, or as are worth timing. Tried are powers
                of two, and widths that cut these into equal parts.
        """
        training_context, train = self.training_context, self.training_context.train
        steps = min(TIMED_STEPS, train.max_steps or TIMED_STEPS)
        self.training_context = replace(training_context, train=train.model_copy(update={"max_steps": steps}))

        def serve(start: int, stop: int) -> object:
            return self.train(tasks[start]) if stop - start == 1 else self._batched(tasks[start:stop])

        try:
            return width_seconds(serve, len(tasks), widths_to_time(len(tasks)))
        except CannotBatch:
            return {1: math.inf}
        finally:
            self.training_context = training_context

    def _batched(self, tasks: Sequence[ClientTask]) -> list[ClientResult]:
        if not self._job.config.clients.tier(self._job.tier).engine.batches_clients:
            raise CannotBatch("the engine is not plain torch")
        if self._process_group.size > 1:
            raise CannotBatch("several processes train one client")
        if self._stack is None or self._stack.members < len(tasks):
            self._stack = AdapterStack(self.adapter, len(tasks))

        def piece(task: ClientTask) -> Callable[[BatchedBackend], ClientResult]:
            return lambda backend: self._named_run(task, backend)

        scale = loss_scale(self.adapter.model)
        return run_batched(self._stack, self.training_context, scale, [piece(task) for task in tasks])

    def _named_run(self, task: ClientTask, backend: ClientBackend) -> ClientResult:
        """Of several clients, an error must say whose it is."""
        try:
            return self._run(task, backend)
        except Exception as error:
            error.add_note(f"client {task.client.id!r}, round {task.server_round}")
            raise

    def _run(self, task: ClientTask, backend: ClientBackend) -> ClientResult:
        client = task.client
        trainer = LocalTrainer(backend, task.shard, client, task.server_round, self.training_context, task.measure)
        before = self.method.init_client(self._initial, client) if task.state is None else task.state
        payload, after = self.method.train_client(backend.adapter, before, task.downlink.payload, trainer)
        if self._meter is not None:
            self._meter.note()
        return ClientResult(
            client=client,
            server_round=task.server_round,
            num_examples=task.shard.num_examples(),
            payload=payload,
            uplink_bytes=num_bytes(payload),
            downlink_bytes=task.downlink.num_bytes,
            report=trainer.report,
            state=after,
            adapter=backend.adapter.tensors() if task.keep == "adapter" else None,
        )

    def _metered(self, method: AnyMethod, tier: TierConfig, resting: int) -> MemoryMeter:
        """Return a meter whose baseline is the bare process with all that was imported for this method and those before
        it. Memory that they freed and the allocator kept is not part of it: this method may use it again.

        resting: what the process had before this method was built.
        """
        tier.engine.prepare_node(self.device)
        method.attach(meta_backbone(self._job.architecture, self._job.config.task))
        now = resting_memory()
        before = self._meter
        return MemoryMeter(self.device, now if before is None else before.baseline + max(now - resting, 0))


def first_head(model: PreTrainedModel, seed: int) -> Vector | None:
    """Return the model's own task head with what its checkpoint lacked drawn; None where it has none."""
    head = head_group(model)
    if head is None:
        return None
    std = getattr(model.config, "initializer_range", 0.02)
    return draw_head(head.layout, head.read(), missing_head(model), seed, std)


def draw_initial(adapter: Adapter, seed: int, head: Vector | None) -> Initial:
    """Return the first values of the adapter's groups, as each group draws them by seed.

    Args:
        adapter: may be that of a model on the meta device, unless a group's first values are the model's own.
        head: the first task head, where there is one.
    """
    layouts = {name: adapter.layout(name) for name in adapter.names}
    vectors = {group.name: group.first_values(seed) for group in adapter.groups if group.name != "head"}
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
    place = "cpu" if tier.engine.weights_on_host else device
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
