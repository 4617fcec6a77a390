"""Many clients in one step: clients of one tier share the frozen base model, so their batches go through it together
and only the adapters are per client.

Every client's batches, losses, draws, clipping, learning rates and optimizer are what they would be alone
(`fedray.training.loop`), so its result is the same up to float rounding. A method stays sequential code: it runs once
per client, on threads that take turns (`fedray.training.lockstep`), and where all of them train or evaluate, that is
done here for all at once.

In a pass every member has the rows and tokens of the largest batch. What a member's own lacks is filled up: tokens that
the attention mask hides, and copies of a row whose loss counts nothing.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fedray.adapters.adapter import Adapter
from fedray.adapters.client_batch import ClientBatch
from fedray.adapters.stacked import AdapterStack
from fedray.data.batches import batches
from fedray.evaluation.evaluate import Units, by_length, evaluating, predictions_of, summarise
from fedray.evaluation.losses import score
from fedray.training import loop
from fedray.training.batched_optimizer import BatchedOptimizer
from fedray.training.importance import check_examples, mean_importance, shift_gradients
from fedray.training.lockstep import Ask, run_in_lockstep
from fedray.training.loop import CHECK_EVERY, Step, dropout_key, total_steps
from fedray.training.optimizer import Schedule
from fedray.training.process_group import SINGLE_PROCESS
from fedray.training.trainer import evaluate_client
from fedray.training.training_context import TrainingContext
from fedray.types import IGNORED, ClientId, Evaluation, Task

Result = TypeVar("Result")
Batch = dict[str, Tensor]

WIDTHS = (1, 2, 4, 8, 16)
"""Numbers of clients that are tried together."""
EQUAL_PARTS = (1, 2, 3)
"""Ten clients of an actor are worth trying in one step of ten, in two of five and three of four, not only in eight and
two."""

TIMED_STEPS = 3
"""Optimizer steps of a client while widths are timed."""
TIMED_REPEATS = 2
CLEARLY = 0.95
"""Share of the time of one by one below which training together is worth its memory."""


@dataclass(frozen=True)
class Train:
    """A client asks to be trained on a table."""

    table: pa.Table
    client: ClientId
    server_round: int


@dataclass(frozen=True)
class Evaluate:
    """A client asks for an evaluation of the adapter as it is loaded now."""

    table: pa.Table


@dataclass(frozen=True)
class Importance:
    """A client asks for the Fisher information of its adapter's layers over a table."""

    table: pa.Table


@dataclass(frozen=True)
class BatchedBackend:
    """One client's place among those whose work is done together; `ClientBackend` of a trainer."""

    adapter: Adapter
    ask: Ask

    def train(self, table: pa.Table, client: ClientId, server_round: int) -> tuple[list[float], float]:
        answer: tuple[list[float], float] = self.ask(Train(table, client, server_round))
        return answer

    def evaluate(self, table: pa.Table) -> Evaluation:
        answer: Evaluation = self.ask(Evaluate(table))
        return answer

    def importance(self, table: pa.Table) -> dict[str, npt.NDArray[np.float64]]:
        answer: dict[str, npt.NDArray[np.float64]] = self.ask(Importance(table))
        return answer


def run_batched(
    stack: AdapterStack,
    training_context: TrainingContext,
    loss_scale: float,
    clients: Sequence[Callable[[BatchedBackend], Result]],
) -> list[Result]:
    """Run every client's code on a member of its own; return their results.

    Args:
        stack: with at least as many members.
        loss_scale: as `TorchEngine`'s.

    Raises:
        Whatever a client raises. CannotBatch: they can only be trained one by one.
    """

    def serve(requests: Mapping[int, Any]) -> Mapping[int, Any]:
        slots = sorted(requests)
        first = requests[slots[0]]
        if isinstance(first, Train):
            return train_batched(stack, requests, training_context, loss_scale)
        tables = {slot: requests[slot].table for slot in slots}
        if isinstance(first, Importance):
            return importance_batched(stack, tables, training_context)
        if training_context.metric.reads == "texts":
            return {slot: _evaluate_alone(stack, slot, table, training_context) for slot, table in tables.items()}
        return evaluate_batched(stack, tables, training_context)

    def on_lane(index: int, client: Callable[[BatchedBackend], Result]) -> Callable[[Ask], Result]:
        return lambda ask: client(BatchedBackend(stack.member(index), ask))

    pieces = [on_lane(index, client) for index, client in enumerate(clients)]
    with stack.installed():
        return run_in_lockstep(pieces, serve, (Evaluate, Importance, Train))


def train_batched(
    stack: AdapterStack, requests: Mapping[int, Train], training_context: TrainingContext, loss_scale: float = 1.0
) -> dict[int, tuple[list[float], float]]:
    """Train the stack's members on their tables, as `train_steps` would each alone.

    Returns: per member the mean loss of every step, and its part of the seconds.

    Raises:
        TrainingError: as `train_steps`, of the first member in the order of the requests.
    """
    numbers = {slot: total_steps(request.table.num_rows, training_context.train) for slot, request in requests.items()}
    slots = sorted(requests, key=lambda slot: -numbers[slot])  # those that go on are always the first ones
    asked = [requests[slot] for slot in slots]
    schedules = [Schedule(training_context.train, requests[slot].server_round, numbers[slot]) for slot in slots]
    values = stack.values[slots]
    groups = stack.adapter.trainable_groups()
    optimizer = BatchedOptimizer(groups, values, schedules)
    on_host = replace(training_context, device="cpu")  # batches are put together there
    steps = [
        loop.steps(request.table, request.client, request.server_round, on_host, SINGLE_PROCESS) for request in asked
    ]
    pending: list[Tensor] = []
    losses: list[list[float]] = [[] for _ in slots]
    seconds = np.zeros(len(slots))
    members, since = 0, perf_counter()
    stack.adapter.model.train()
    for index in range(numbers[slots[0]]):
        if members != (alive := sum(numbers[slot] > index for slot in slots)):
            seconds[:members] += (perf_counter() - since) / max(members, 1)
            members, since = alive, perf_counter()
            stack.use(values[:members], slots[:members], training=True)
        pending.append(
            _backward(stack, slots[:members], asked[:members], steps[:members], index, training_context, loss_scale)
        )
        gradients, present = stack.take_gradients()
        optimizer.step(gradients if loss_scale == 1 else gradients.div_(loss_scale), index, present)
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == numbers[slots[0]]:
            _look(pending, losses)
            finite = optimizer.finite()
            for member in sorted(range(len(slots)), key=lambda member: slots[member]):
                rates = schedules[member].rates(groups, len(losses[member]) - 1)
                loop.check_finite(
                    losses[member], finite[member], rates, asked[member].client, asked[member].server_round
                )
    seconds[:members] += (perf_counter() - since) / members
    stack.adapter.model.eval()
    stack.values[slots] = values
    return {slot: (losses[member], float(seconds[member])) for member, slot in enumerate(slots)}


def evaluate_batched(
    stack: AdapterStack, tables: Mapping[int, pa.Table], training_context: TrainingContext
) -> dict[int, Evaluation]:
    """Evaluate the stack's members on their tables, as `evaluate` would each alone, by a metric that is not of
    generated text."""
    found = {slot: Evaluation(math.nan, math.nan, 0) for slot, table in tables.items() if table.num_rows == 0}
    full = {slot: table for slot, table in tables.items() if slot not in found}
    parts: dict[int, list[list[Tensor]]] = {slot: [] for slot in full}
    with evaluating(stack.adapter.model):
        for slots, joined in _passes(stack, full, training_context.evaluation.batch_size, by_length, training_context):
            scored = score(stack.adapter.model, joined.on(training_context.device), training_context.task)
            predicted = predictions_of(scored, training_context.task)
            for slot, own in zip(slots, joined.own_units(training_context.device), strict=True):
                parts[slot].append([scored.losses[own], predicted[own], scored.labels[own]])
    for slot, scored_parts in parts.items():
        units = Units(*(torch.cat(part).cpu().numpy() for part in zip(*scored_parts, strict=True)))
        found[slot] = summarise(units, training_context.metric, tables[slot].num_rows)
    return found


def importance_batched(
    stack: AdapterStack, tables: Mapping[int, pa.Table], training_context: TrainingContext
) -> dict[int, dict[str, npt.NDArray[np.float64]]]:
    """Return the Fisher information of the stack's members over their tables, as `fisher_importance` would each alone.

    Raises:
        TrainingError: as `fisher_importance`, of the first member.
    """
    totals: dict[int, dict[str, Tensor]] = {slot: {} for slot in tables}
    check_examples(tables.values())
    stack.adapter.model.eval()
    for slots, joined in _passes(stack, tables, training_context.train.batch_size, lambda _: None, training_context):
        batch = joined.on(training_context.device)
        for path, gradient in shift_gradients(
            stack.adapter.model, stack.adapter.targets, batch, training_context.task
        ).items():
            squares = gradient.double().square().view(len(slots), joined.rows, -1)
            for member, (slot, (rows, _)) in enumerate(zip(slots, joined.shapes, strict=True)):
                own = squares[member, :rows].sum(0)
                totals[slot][path] = totals[slot][path] + own if path in totals[slot] else own
    return {slot: mean_importance(totals[slot], tables[slot].num_rows) for slot in sorted(tables)}


def _passes(
    stack: AdapterStack,
    tables: Mapping[int, pa.Table],
    batch_size: int,
    order: Callable[[pa.Table], npt.NDArray[np.int64] | None],
    training_context: TrainingContext,
) -> "Iterator[tuple[list[int], Joined]]":
    """Make the stack ready for one pass without training after another, until all members have read their tables; yield
    who takes part in it, and their batches."""
    numbers = {slot: math.ceil(table.num_rows / batch_size) for slot, table in tables.items()}
    slots = sorted(numbers, key=lambda slot: -numbers[slot])  # those that go on are always the first ones
    cut = [batches(tables[slot], batch_size, training_context.pad_token_id, order(tables[slot])) for slot in slots]
    values = stack.values[slots]
    members = 0
    for index in range(max(numbers.values(), default=0)):
        if members != (alive := sum(number > index for number in numbers.values())):
            members = alive
            stack.use(values[:members], slots[:members], training=False)
        joined = join([next(one) for one in cut[:members]], training_context.task, training_context.pad_token_id)
        stack.adapter.context.client_batch = ClientBatch(
            tuple(slots[:members]), joined.shapes, joined.rows, training_context.device
        )
        yield slots[:members], joined


@dataclass(frozen=True)
class Joined:
    """Several members' batches as one of [members · rows, tokens].

    shapes: each member's own (examples, tokens). units: of every row in the pass, for causal_lm its answer tokens.
    """

    batch: Batch
    shapes: tuple[tuple[int, int], ...]
    rows: int
    units: npt.NDArray[np.int64]

    def on(self, device: Any) -> Batch:
        return {name: tensor.to(device) for name, tensor in self.batch.items()}

    def weights(self, num_units: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return each unit's weight in its member's loss, 0 in rows that only fill up, and its member. [units]"""
        row = np.repeat(np.arange(len(self.units)), self.units)
        member = row // self.rows
        own = row % self.rows < np.array([rows for rows, _ in self.shapes])[member]
        return torch.from_numpy((own / np.array(num_units)[member]).astype(np.float32)), torch.from_numpy(member)

    def own_units(self, device: Any) -> Iterator[Tensor]:
        """Yield the indices of each member's own units."""
        ends = np.concatenate([[0], np.cumsum(self.units)])
        for member, (rows, _) in enumerate(self.shapes):
            yield torch.arange(ends[member * self.rows], ends[member * self.rows + rows], device=device)


def join(parts: Sequence[Batch], task: Task, pad_token_id: int) -> Joined:
    """Put the members' batches into one. A member without rows of its own is filled up with another's examples.

    Row copies have no answer tokens for causal_lm, and count with weight 0 otherwise.
    """
    shapes = tuple((part["input_ids"].shape[0], part["input_ids"].shape[1]) for part in parts)
    rows, tokens = max(rows for rows, _ in shapes), max(tokens for _, tokens in shapes)
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}
    some = next(part for part, (own, _) in zip(parts, shapes, strict=True) if own)
    for name, like in some.items():
        joined = like.new_full((len(parts), rows, *([tokens] if like.ndim == 2 else [])), fills.get(name, 0))
        for member, part, (own, width) in zip(joined, parts, shapes, strict=True):
            if own < rows and not (task == "causal_lm" and name == "labels"):
                source = part[name] if own else some[name]
                member[own:][..., : source.shape[1] if source.ndim == 2 else None] = source[0]
            if own:
                member[:own][..., : width if like.ndim == 2 else None] = part[name]
        batch[name] = joined.flatten(0, 1)
    if task == "causal_lm":
        units = (batch["labels"][:, 1:] != IGNORED).sum(1).numpy()
    else:
        units = np.ones(len(parts) * rows, np.int64)
    return Joined(batch, shapes, rows, units)


def width_seconds(
    serve: Callable[[int, int], object],
    number: int,
    widths: Sequence[int] = WIDTHS,
    clock: Callable[[], float] = perf_counter,
) -> dict[int, float]:
    """Return the seconds in which all clients are served, by how many are served together; always with 1.

    Every width serves all clients, so that all do the same work, in turn. A width that does not fit into the device's
    memory ends the search, as do those above it.

    Args:
        serve: trains the clients from one index up to another together.
        number: of clients.
    """
    possible = [width for width in sorted({1, *widths}) if width <= number]
    for place, width in enumerate(possible):
        try:
            serve(0, width)  # the first time allocates
        except torch.OutOfMemoryError:
            if width == 1:
                raise
            possible = possible[:place]
            break
    seconds = dict.fromkeys(possible, math.inf)
    for _ in range(TIMED_REPEATS):
        for width in possible:
            started = clock()
            for start in range(0, number, width):
                serve(start, min(start + width, number))
            seconds[width] = min(seconds[width], clock() - started)
    return seconds


def fastest_width(seconds: Mapping[int, float], cohort: int, actors: int) -> int:
    """Return how many of a tier's clients are best trained together: 1, unless another number is clearly faster.

    A round lasts until its busiest actor has finished, and groups are not split: of 20 clients in groups of 8, one of
    two actors has 12. Clients are taken to be equal.

    Args:
        seconds: in which an actor trains the same clients, by how many are trained together (`width_seconds`).
        cohort: clients of the tier in a round.
        actors: that serve the tier.
    """
    rounds = {width: taken * _busiest(cohort, actors, width) for width, taken in seconds.items()}
    best = min(rounds, key=lambda width: rounds[width])
    return best if rounds[best] < CLEARLY * rounds[1] else 1


def _busiest(cohort: int, actors: int, width: int) -> int:
    """Return how many clients the busiest actor has, where groups go to whoever has fewest."""
    loads = [0] * actors
    for start in range(0, cohort, width):
        heapq.heapreplace(loads, loads[0] + min(width, cohort - start))
    return max(loads)


def _backward(
    stack: AdapterStack,
    slots: Sequence[int],
    asked: Sequence[Train],
    steps: Sequence[Iterator[Step]],
    index: int,
    training_context: TrainingContext,
    loss_scale: float,
) -> Tensor:
    """Leave the step's gradients in the stack's parameters; return every member's mean loss, [members]."""
    taken = [next(step) for step in steps]
    context = stack.adapter.context
    total = torch.zeros(len(taken), device=training_context.device)
    for micro in range(max(len(step.micro_batches) for step in taken)):
        parts = [step.micro_batches.get(micro) or _none_of(step) for step in taken]
        joined = join(parts, training_context.task, training_context.pad_token_id)
        keys = [dropout_key(training_context, request.client, request.server_round, index, micro) for request in asked]
        context.client_batch = ClientBatch(
            tuple(slots), joined.shapes, joined.rows, training_context.device, tuple(keys)
        )
        scored = score(stack.adapter.model, joined.on(training_context.device), training_context.task)
        weights, member = (
            part.to(training_context.device) for part in joined.weights([step.num_units for step in taken])
        )
        losses = torch.zeros_like(total).index_add(0, member, scored.losses * weights)
        (losses.sum() * loss_scale).backward()  # type: ignore[no-untyped-call]
        total += losses.detach()
    return total


def _none_of(step: Step) -> Batch:
    """A member whose step has fewer micro-batches than others' takes part without examples."""
    return {name: tensor[:0] for name, tensor in step.micro_batches[0].items()}


def _look(pending: list[Tensor], losses: Sequence[list[float]]) -> None:
    """Move the steps' losses, [members that took it] each, to the members'; the host waits for the device once."""
    numbers = iter(torch.cat(pending).tolist())
    for step in pending:
        for member in range(len(step)):
            losses[member].append(next(numbers))
    pending.clear()


def _evaluate_alone(stack: AdapterStack, slot: int, table: pa.Table, training_context: TrainingContext) -> Evaluation:
    stack.use(stack.values[slot : slot + 1], [slot], training=False)
    stack.adapter.context.client_batch = ClientBatch((slot,), (), 0, training_context.device)
    return evaluate_client(stack.adapter, table, training_context)
