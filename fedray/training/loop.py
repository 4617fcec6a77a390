"""The training loop of one client in one round, whatever the engine.

The client's training examples are shuffled anew for every epoch (grouped by length, if configured) and cut into
micro-batches of `batch_size`; `accumulation` of those make one optimizer step (the last step of an epoch may have
fewer). The gradient of a step is that of the mean loss over all its units (examples; answer tokens for causal_lm),
exactly as of one large batch. The processes of a process group share a step's micro-batches.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch

from fedray.adapters.adapter import Adapter
from fedray.config import TrainConfig
from fedray.data.batches import Indices, batches, lengths
from fedray.errors import TrainingError
from fedray.evaluation.losses import num_units, score
from fedray.randomness import Key, keyed_rng, keyed_seed
from fedray.training.engine import Engine
from fedray.training.process_group import ProcessGroup
from fedray.training.schedule import Schedule
from fedray.training.steering import Steered, Steering, check_steering
from fedray.training.training_context import TrainingContext
from fedray.types import ClientId, Vector, round_number

CHECK_EVERY = 50
"""Steps between checks of the losses; a check makes the host wait for the device."""

GROUPED_STEPS = 8
"""Steps whose examples are sorted together with `train.group_by_length`: enough for steps of little padding, few enough
that an example is batched with others in the next epoch."""


@dataclass(frozen=True)
class Train:
    """What one call of `Local.train` asks for.

    Attributes:
        table: the training examples.
        parts: what trains, as in `Adapter.narrowed`.
        epochs: instead of the configured number.
        steps: optimizer steps, instead of the configured amount.
        phase: the training's index in the round, which keys the order of the examples and the dropout.
        steering: added to the gradients.
        mean_gradient: whether the mean of the raw gradients is needed.
    """

    table: pa.Table
    client: ClientId
    server_round: int
    parts: tuple[str, ...] | None = None
    epochs: float | None = None
    steps: int | None = None
    phase: int = 0
    steering: Steering | None = None
    mean_gradient: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """Requests of one kind can be trained in one step."""
        return self.parts, type(self.steering), self.mean_gradient

    @property
    def phase_key(self) -> tuple[Key, ...]:
        """What the phase adds to the key of a draw: nothing in phase 0."""
        return ("phase", self.phase) if self.phase else ()

    def num_steps(self, train: TrainConfig) -> int:
        """Return how many optimizer steps the training takes."""
        if self.steps is not None:
            return self.steps
        return total_steps(self.table.num_rows, train, self.epochs)

    def schedule(self, training_context: TrainingContext) -> Schedule:
        """Return the learning rates of the training."""
        train = training_context.train
        return Schedule(train, self.server_round, self.num_steps(train), training_context.rounds)


@dataclass(frozen=True)
class Trained:
    """What a training returns besides the trained values.

    Attributes:
        losses: mean loss of every step.
        seconds: the client's share.
        mean_gradient: of the raw gradients over the steps, by group; empty unless it was asked for.
    """

    losses: list[float]
    seconds: float
    mean_gradient: Mapping[str, Vector]


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        micro_batches: this process's, by their index in the step.
        num_units: number of units over which the loss of all micro-batches is the mean.
    """

    micro_batches: dict[int, dict[str, torch.Tensor]]
    num_units: int


def check_call(
    adapter: Adapter,
    parts: Sequence[str] | None,
    epochs: float | None,
    steps: int | None,
    steering: Steering | None,
    mean_gradient: bool,
) -> None:
    """Check the arguments of `Local.train` against the adapter.

    Raises:
        KeyError: a group or a part that the adapter does not have.
        TrainingError: the arguments contradict each other, or do not fit what trains.
    """
    if epochs is not None and steps is not None:
        raise TrainingError(f"train(epochs={epochs}, steps={steps}): give one of them")
    if (epochs is not None and epochs <= 0) or (steps is not None and steps < 1):
        raise TrainingError(f"train(epochs={epochs}, steps={steps}): expected more than 0")
    with adapter.narrowed(parts):
        check_steering(adapter, steering, mean_gradient)


def total_steps(num_examples: int, train: TrainConfig, epochs: float | None = None) -> int:
    """Return the optimizer steps of a training: epochs · ⌈n / (batch_size · accumulation)⌉, rounded up where `epochs`
    is fractional, and at most `max_steps`.

    Args:
        epochs: instead of the configured ones.
    """
    per_epoch = math.ceil(num_examples / (train.batch_size * train.accumulation))
    steps = math.ceil((epochs or train.epochs) * per_epoch - 1e-9)  # 1.1 · 50 is a little more than 55 in floats
    return min(steps, train.max_steps or steps)


def train_steps(engine: Engine, request: Train, training_context: TrainingContext) -> Trained:
    """Train the engine's adapter as requested.

    Raises:
        ConfigError: the engine cannot do what is requested.
        TrainingError: a step without answer tokens, or a loss or a trained value that is not finite.
    """
    started = perf_counter()
    with engine.adapter.narrowed(request.parts):
        losses, mean_gradient = _train(engine, request, training_context)
    return Trained(losses, perf_counter() - started, mean_gradient)


def _train(
    engine: Engine, request: Train, training_context: TrainingContext
) -> tuple[list[float], Mapping[str, Vector]]:
    adapter = engine.adapter
    num_steps = request.num_steps(training_context.train)
    schedule = request.schedule(training_context)
    steered = Steered.of(adapter, [request.steering], request.mean_gradient)
    losses: list[torch.Tensor] = []
    checked: list[float] = []
    adapter.model.train()  # only the adapter's dropout acts: the base model's probabilities are zero
    engine.begin(schedule, steered)
    for index, step in enumerate(islice(steps(request, training_context, engine.process_group), num_steps)):
        losses.append(_backward(engine, step, index, request, training_context))
        engine.step()
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == num_steps:
            rates = schedule.rates(adapter.trainable_groups(), index)
            checked += engine.process_group.sum(torch.stack(losses)).tolist()
            losses.clear()
            check_finite(checked, engine.finite(), rates, request)
    adapter.model.eval()
    return checked, {} if steered is None else steered.means()[0]


def steps(request: Train, training_context: TrainingContext, process_group: ProcessGroup) -> Iterator[Step]:
    """Yield the steps of epoch after epoch without end."""
    train, table, client, server_round = training_context.train, request.table, request.client, request.server_round
    units = num_units(table, training_context.task)
    for epoch in count():
        order = epoch_order(table, train, training_context.seed, server_round, client, epoch, request.phase_key)
        cuts = [order[start : start + train.batch_size] for start in range(0, table.num_rows, train.batch_size)]
        stepped = [cuts[start : start + train.accumulation] for start in range(0, len(cuts), train.accumulation)]
        own = [[index for index in range(len(step)) if process_group.mine(index)] for step in stepped]
        rows = [step[index] for step, indices in zip(stepped, own, strict=True) for index in indices]
        mine = np.concatenate([order[:0], *rows])  # all of full size but the epoch's last: they are cut again as here
        micro_batches = batches(table, train.batch_size, training_context.pad_token_id, mine, training_context.device)
        for step, indices in zip(stepped, own, strict=True):
            step_units = int(sum(units[cut].sum() for cut in step))
            if step_units == 0:
                raise TrainingError(
                    f"client {client!r}, round {round_number(server_round)}: a step's examples have no answer tokens; "
                    "check data.answer, or raise data.max_length"
                )
            yield Step({index: next(micro_batches) for index in indices}, step_units)


def epoch_order(
    table: pa.Table,
    train: TrainConfig,
    seed: int,
    server_round: int,
    client: ClientId,
    epoch: int,
    phase_key: Sequence[Key] = (),
) -> Indices:
    """Return the order in which one epoch reads the training examples."""
    rng = keyed_rng(seed, "order", server_round, client, epoch, *phase_key)
    order: Indices = rng.permutation(table.num_rows)
    if train.group_by_length:
        return grouped_by_length(order, lengths(table), train.batch_size * train.accumulation, rng)
    return order


def grouped_by_length(order: Indices, lengths: Indices, step: int, rng: np.random.Generator) -> Indices:
    """Return the order with rows of similar length together: sorted by length within runs of `GROUPED_STEPS` steps, cut
    into steps, and these shuffled; a last step that is not full stays the last.

    Args:
        order: rows.
        lengths: of all rows.
        step: rows of an optimizer step.
        rng: shuffles the steps.
    """
    runs = [order[start : start + GROUPED_STEPS * step] for start in range(0, len(order), GROUPED_STEPS * step)]
    ordered = [run[np.argsort(-lengths[run], kind="stable")] for run in runs]
    cuts = [run[start : start + step] for run in ordered for start in range(0, len(run), step)]
    rest = [cuts.pop()] if cuts and len(cuts[-1]) < step else []
    return np.concatenate([order[:0], *(cuts[index] for index in rng.permutation(len(cuts))), *rest])


def dropout_key(training_context: TrainingContext, request: Train, step: int, micro: int) -> int:
    """Return what keys the adapter's dropout in one micro-batch of one step."""
    key = (request.server_round, request.client, step, micro, *request.phase_key)
    return keyed_seed(training_context.seed, "dropout", *key)


def _backward(
    engine: Engine, step: Step, index: int, request: Train, training_context: TrainingContext
) -> torch.Tensor:
    """Leave the step's gradient in the parameters; return its mean loss, a scalar that may still be in flight."""
    total = torch.zeros(
        (), device=training_context.device
    )  # a process_group's last step may have nothing for this process
    for micro, batch in step.micro_batches.items():
        engine.adapter.set_dropout_key(dropout_key(training_context, request, index, micro))
        loss = score(engine.adapter.model, batch, training_context.task).losses.sum() / step.num_units
        engine.backward(loss, last=micro == max(step.micro_batches))
        total += loss.detach()
    return total


def check_finite(losses: list[float], values_finite: bool, rates: list[float], request: Train) -> None:
    """Check the losses, and the trained values, too: a loss can be finite while its gradient is not.

    Raises:
        TrainingError: a loss or a trained value is not finite.
    """
    finite = [math.isfinite(loss) for loss in losses]
    if all(finite) and values_finite:
        return
    step = finite.index(False) if False in finite else len(losses) - 1
    what = "the loss is" if False in finite else "the loss is finite, but the trained values are"
    shown = ", ".join(f"{rate:.3g}" for rate in sorted(set(rates)))
    raise TrainingError(
        f"client {request.client!r}, round {round_number(request.server_round)}, step {step}: {what} not finite "
        f"(learning rate {shown}); lower train.lr, or set train.clip"
    )
