"""The training loop of one client in one round, whatever the engine.

The client's training examples are shuffled anew for every epoch (grouped by length, if configured) and cut into
micro-batches of `batch_size`; `accumulation` of those make one optimizer step (the last step of an epoch may have
fewer). The gradient of a step is that of the mean loss over all its units (examples; answer tokens for causal_lm),
exactly as of one large batch. The processes of a process group share a step's micro-batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import pyarrow as pa
import torch

from fedray.config import TrainConfig
from fedray.data.batches import Indices, batches
from fedray.errors import TrainingError
from fedray.evaluation.evaluate import lengths
from fedray.evaluation.losses import num_units, score
from fedray.randomness import keyed_rng, keyed_seed
from fedray.training.engine import Engine
from fedray.training.optimizer import Schedule
from fedray.training.process_group import ProcessGroup
from fedray.training.training_context import TrainingContext
from fedray.types import ClientId, round_number

CHECK_EVERY = 50
"""Steps between checks of the losses; a check makes the host wait for the device."""

GROUPED_STEPS = 8
"""Steps whose examples are sorted together with `train.group_by_length`: enough for steps of little padding, few enough
that an example is batched with others in the next epoch."""


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        micro_batches: this process's, by their index in the step.
        num_units: number of units over which the loss of all micro-batches is the mean.
    """

    micro_batches: dict[int, dict[str, torch.Tensor]]
    num_units: int


def total_steps(num_examples: int, train: TrainConfig) -> int:
    """Return the optimizer steps of a round: epochs · ⌈n / (batch_size · accumulation)⌉, rounded up where `epochs` is
    fractional, and at most `max_steps`."""
    per_epoch = math.ceil(num_examples / (train.batch_size * train.accumulation))
    steps = math.ceil(train.epochs * per_epoch - 1e-9)  # 1.1 · 50 is a little more than 55 in floats
    return min(steps, train.max_steps or steps)


def train_steps(
    engine: Engine, table: pa.Table, client: ClientId, server_round: int, training_context: TrainingContext
) -> list[float]:
    """Train the engine's adapter, its trainable groups, on the table; return the mean loss of every step.

    Raises:
        TrainingError: a step without answer tokens, or a loss or a trained value that is not finite.
    """
    adapter = engine.adapter
    num_steps = total_steps(table.num_rows, training_context.train)
    schedule = Schedule(training_context.train, server_round, num_steps)
    losses: list[torch.Tensor] = []
    checked: list[float] = []
    adapter.model.train()  # only the adapter's dropout acts: the base model's probabilities are zero
    engine.begin(schedule)
    for index, step in enumerate(
        islice(steps(table, client, server_round, training_context, engine.process_group), num_steps)
    ):
        losses.append(_backward(engine, step, index, client, server_round, training_context))
        engine.step()
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == num_steps:
            rates = schedule.rates(adapter.trainable_groups(), index)
            checked += engine.process_group.sum(torch.stack(losses)).tolist()
            losses.clear()
            check_finite(checked, engine.finite(), rates, client, server_round)
    adapter.model.eval()
    return checked


def steps(
    table: pa.Table, client: ClientId, server_round: int, training_context: TrainingContext, process_group: ProcessGroup
) -> Iterator[Step]:
    """Yield the steps of epoch after epoch without end."""
    train = training_context.train
    units = num_units(table, training_context.task)
    for epoch in count():
        rng = keyed_rng(training_context.seed, "order", server_round, client, epoch)
        order = rng.permutation(table.num_rows)
        if train.group_by_length:
            order = grouped_by_length(order, lengths(table), train.batch_size * train.accumulation, rng)
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


def dropout_key(training_context: TrainingContext, client: ClientId, server_round: int, step: int, micro: int) -> int:
    """Return what keys the adapter's dropout in one micro-batch of one step."""
    return keyed_seed(training_context.seed, "dropout", server_round, client, step, micro)


def _backward(
    engine: Engine, step: Step, index: int, client: ClientId, server_round: int, training_context: TrainingContext
) -> torch.Tensor:
    """Leave the step's gradient in the parameters; return its mean loss, a scalar that may still be in flight."""
    total = torch.zeros(
        (), device=training_context.device
    )  # a process_group's last step may have nothing for this process
    for micro, batch in step.micro_batches.items():
        engine.adapter.set_dropout_key(dropout_key(training_context, client, server_round, index, micro))
        loss = score(engine.adapter.model, batch, training_context.task).losses.sum() / step.num_units
        engine.backward(loss, last=micro == max(step.micro_batches))
        total += loss.detach()
    return total


def check_finite(
    losses: list[float], values_finite: bool, rates: list[float], client: ClientId, server_round: int
) -> None:
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
        f"client {client!r}, round {round_number(server_round)}, step {step}: {what} not finite "
        f"(learning rate {shown}); lower train.lr, or set train.clip"
    )
