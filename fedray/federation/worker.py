"""A worker: one frozen base model and one adapter that serve many virtual clients.

The class is plain Python: `ClientActor` wraps it as a Ray actor, and `LocalPool` calls it directly.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedray.adapters.adapter import Adapter
from fedray.adapters.client_batch import CannotBatch
from fedray.adapters.stacked import AdapterStack
from fedray.config import EvaluationConfig, ModelConfig, TierConfig
from fedray.evaluation.metrics import configured_metrics, generates_text
from fedray.federation.initial import common_head, draw_initial
from fedray.federation.tasks import ClientResult, ClientTask, WorkerSetup
from fedray.methods.protocol import AnyMethod, Initial
from fedray.methods.registry import build_method
from fedray.models.backbone import held_elsewhere, meta_backbone
from fedray.models.checks import check_beams, reads_left_padding
from fedray.models.quantised import bitsandbytes
from fedray.models.tokenizer import load_tokenizer
from fedray.storage.state_tree import num_bytes
from fedray.training.base_model import held_architecture, held_once, load_base_model, resolve_device
from fedray.training.batch_width import TIMED_STEPS, width_seconds, widths_to_time
from fedray.training.batched import BatchedBackend, run_batched
from fedray.training.engine import Engine, make_engine
from fedray.training.memory import frozen_bytes
from fedray.training.metering import BareProcess, MemoryMeter, MemoryUse, bare_process, cap_gpu_memory
from fedray.training.mixed_precision import mixed_precision
from fedray.training.process_group import SINGLE_PROCESS, ProcessGroup
from fedray.training.process_memory import keep_freed_memory
from fedray.training.threads import set_threads
from fedray.training.torch_engine import loss_scale
from fedray.training.trainer import ClientBackend, EngineBackend, LocalTrainer, MeasuredOnly
from fedray.training.training_context import TrainingContext
from fedray.types import Moment, round_number

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Served:
    """The method that a worker serves, and what was created for it."""

    method: AnyMethod
    adapter: Adapter
    engine: Engine
    initial: Initial


class Worker:
    """Trains clients with one method at a time; `setup` prepares it for the next method.

    Args:
        process_group: the processes that train a client together with this one, if the clients are silos.
        gpus: share of a GPU that this process has; 0 if it is no actor of its own.
    """

    def __init__(self, process_group: ProcessGroup = SINGLE_PROCESS, gpus: float = 0.0) -> None:
        self._process_group = process_group
        self._gpus = gpus
        keep_freed_memory()
        self._stack: AdapterStack | None = None
        self._warned: set[str] = set()
        self._served: _Served | None = None
        self._meter: MemoryMeter | None = None
        self._tokenizer: tuple[ModelConfig, PreTrainedTokenizerBase] | None = None

    def setup(self, setup: WorkerSetup) -> None:
        """Load the base weights, attach the method's adapter, and drop the previous method."""
        if self._served is not None:
            self._served.engine.close()
            self._served = self._stack = None
            gc.collect()  # before anything is loaded: two base models at once may not fit
        config, self._setup = setup.config, setup
        tier = config.clients.tier(setup.tier)
        self.device = resolve_device(config, tier)
        set_threads(config.clients.tier_threads(tier, self.device))
        resting = bare_process()
        sections = config.section_for(setup.entry, setup.tier)
        method = build_method(config, setup.entry, setup.tier)
        generating = generates_text(configured_metrics(config))
        tokenizer = self._tokenizer_of(config.model) if generating else None
        self._meter = self._metered(method, tier, resting)
        model = load_base_model(config, setup.architecture, setup.tier, tier, self.device, self._shares(method, tier))
        cap_gpu_memory(self._gpus, held_elsewhere(model))
        if generating:
            self._check_generation(model, config.evaluation.generation.num_beams)
        about = setup.architecture, setup.entry, method, setup.tier, setup.label_names, self.device
        head = common_head(model, config, *about)
        adapter = mixed_precision(method.attach(model))
        self.training_context = TrainingContext(
            task=config.task,
            train=sections.train,
            seed=config.seed,
            pad_token_id=setup.pad_token_id,
            evaluation=config.evaluation,
            device=self.device,
            tokenizer=tokenizer,
            end_token_ids=setup.end_token_ids,
            common=setup.common,
            common_moments=_common_moments(config.evaluation, setup.personalised),
            rounds=config.rounds,
        )
        initial = draw_initial(adapter, config.seed, head)
        for name in adapter.names:  # methods load what they train; the rest stays as loaded here
            adapter.load(name, initial.vectors[name])
        engine = make_engine(adapter, sections.train, tier, self.device, self._process_group)
        self._served = _Served(method, adapter, engine, initial)

    @property
    def method(self) -> AnyMethod:
        """The method that this worker serves."""
        return self._serving.method

    @property
    def adapter(self) -> Adapter:
        """The method's adapter, on this worker's base model."""
        return self._serving.adapter

    @property
    def engine(self) -> Engine:
        """The engine that trains the adapter."""
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
        """Return this process's peak memory since `setup`."""
        if self._meter is None:
            raise RuntimeError("setup() comes first")
        return replace(self._meter.read(), held_elsewhere=held_elsewhere(self.adapter.model))

    def initial(self) -> Initial:
        """Return the common starting point, complete even if this tier holds only a part of it; it is the same on every
        worker."""
        setup = self._setup
        method = build_method(setup.config, setup.entry)
        if method == self.method:
            return self._initial
        whole = method.attach(meta_backbone(setup.architecture, setup.config.task))
        if {name: whole.layout(name) for name in whole.names} == self._initial.layouts:
            return self._initial
        return draw_initial(whole, setup.config.seed, self._initial.head())

    def train(self, task: ClientTask) -> ClientResult:
        """Run one client's task.

        Returns:
            The result, with the client's next state and, if the task keeps it, the trained adapter.
        """
        return self._run(task, EngineBackend(self.engine, self.training_context))

    def train_together(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Run several clients' tasks: with one step for all of them if possible (`fedray.training.batched`), otherwise
        one after another. Results equal those of `train` up to float rounding, which depends on the clients that are
        trained together.

        Yields:
            The results, in the order of the tasks.
        """
        try:
            if len(tasks) > 1:
                yield from self._batched(tasks)
                return
        except CannotBatch as reason:
            self._warn_once(f"clients are trained one by one: {reason}")
        for task in tasks:
            yield self.train(task)

    def width_seconds(self, tasks: Sequence[ClientTask]) -> dict[int, float]:
        """Return the seconds that the first steps of all these clients take, by how many clients are trained together.
        The tried numbers are powers of two, and those that cut the tasks into equal parts. Nothing is kept of the
        training.

        Args:
            tasks: tasks of typical clients, as many as an actor serves in a round or as are worth timing.

        Returns:
            The seconds by number of clients; only of 1 if no other number is possible.
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

    def _tokenizer_of(self, model: ModelConfig) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer, which all its methods use."""
        if self._tokenizer is None or self._tokenizer[0] != model:
            self._tokenizer = model, load_tokenizer(model)
        return self._tokenizer[1]

    def _check_generation(self, model: PreTrainedModel, num_beams: int) -> None:
        """Check that texts can be generated as configured.

        Raises:
            ConfigError: the model cannot search with beams.
        """
        if num_beams > 1:
            check_beams(model, num_beams)
        if reads_left_padding(model):
            self._warn_once(
                "texts are generated one prompt and one client at a time, since the model reads padding on the left"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("tier %s: %s", self._setup.tier, message)

    def _batched(self, tasks: Sequence[ClientTask]) -> list[ClientResult]:
        if not self._setup.config.clients.tier(self._setup.tier).engine.batches_clients:
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
        """Run a task; an error says which of several clients it belongs to."""
        try:
            return self._run(task, backend)
        except Exception as error:
            error.add_note(f"client {task.client.id!r}, round {round_number(task.server_round)}")
            raise

    def _run(self, task: ClientTask, backend: ClientBackend) -> ClientResult:
        client = task.client
        evaluation, final = self.training_context.evaluation, task.keep == "adapter"
        measured = task.measure, task.measure_server, evaluation.examples and final
        trains = not final or evaluation.final == "both"
        trainer = LocalTrainer(backend, task.shard, client, task.server_round, self.training_context, *measured, trains)
        before = self.method.init_client(self._initial, client) if task.state is None else task.state
        try:
            payload, after = self.method.train_client(backend.adapter, before, task.downlink.payload, trainer)
        except MeasuredOnly:
            payload, after = None, before
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

    def _shares(self, method: AnyMethod, tier: TierConfig) -> bool:
        """Return whether the base model is that of all actors on this GPU."""
        if self.device != "cuda" or not 0 < self._gpus < 1:
            return False
        model = meta_backbone(held_architecture(self._setup.architecture, tier), self._setup.config.task)
        base = [*model.parameters(), *model.buffers()]
        adapter = method.attach(model)
        return held_once(self._setup.config, tier, frozen_bytes(base), adapter) > 0

    def _metered(self, method: AnyMethod, tier: TierConfig, resting: BareProcess) -> MemoryMeter:
        """Return a meter whose bare process has everything that was imported for this method, earlier ones and the
        metrics, and the tokenizer. Memory that earlier methods freed and the allocator kept is no part of it, because
        this method may use it again.

        Args:
            resting: the process before this method was built.
        """
        tier.engine.prepare_node(self.device)
        if tier.quantised:
            bitsandbytes()
        method.attach(meta_backbone(self._setup.architecture, self._setup.config.task))
        for metric in configured_metrics(self._setup.config):
            for name in metric.libraries:
                import_module(name)
        now = bare_process()
        if self._meter is not None:
            now = self._meter.bare.with_imports(max(now.anonymous - resting.anonymous, 0))
        return MemoryMeter(self.device, now)


def _common_moments(evaluation: EvaluationConfig, personalised: bool) -> tuple[Moment, ...]:
    """Return when a client's model is evaluated on the common test set. Before local training, the clients of a method
    with one model for all have the server's."""
    wanted: list[Moment] = [moment for moment in get_args(Moment) if moment in evaluation.common]
    if not personalised and "server" in evaluation.common and "aggregated" in wanted:
        wanted.remove("aggregated")
    return tuple(wanted)
