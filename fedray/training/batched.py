"""Batched clients: several clients of one tier are trained in one step.

They share the frozen base model, so their batches go through it together, and only the adapters are per client. Every
client's batches, losses, draws, clipping, learning rates and optimizer are what they would be alone
(`fedray.training.loop`), so its result is the same up to float rounding. A method stays sequential code: it runs once
per client, each time on a thread of its own (`fedray.training.lockstep`). When all threads wait for training or an
evaluation, it is computed here for all clients together.

The clients of a batch are its members. In a forward pass every member has the rows and tokens of the largest batch
(`fedray.training.joined`). Smaller ones are padded: with tokens that the attention mask hides, and with copies of a row
whose loss has weight 0.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from fedray.data.batches import by_length
from fedray.evaluation.evaluate import Units, evaluating, score_units, summarise, unmeasured
from fedray.evaluation.generation import generate, generate_batch, prompts_alone
from fedray.evaluation.losses import score
from fedray.evaluation.options import has_options, log_likelihoods, options_of
from fedray.models.checks import reads_left_padding
from fedray.randomness import Key
from fedray.training import loop
from fedray.training.batched_optimizer import BatchedOptimizer
from fedray.training.importance import check_examples, mean_importance, shift_gradients
from fedray.training.joined import Batch, join, passes
from fedray.training.lockstep import Ask, run_in_lockstep
from fedray.training.loop import CHECK_EVERY, Step, Train, Trained, dropout_key
from fedray.training.process_group import SINGLE_PROCESS
from fedray.training.steering import Steered
from fedray.training.training_context import TrainingContext
from fedray.types import Evaluation

Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluate:
    """A client asks for an evaluation of the adapter as it is loaded now.

    Attributes:
        generating: whether text is generated for a metric of texts, and options are scored for one that ranks them.
        key: of the table, for sampled text.
        each: whether every example's values are wanted.
    """

    table: pa.Table
    generating: bool
    key: Sequence[Key]
    each: bool


@dataclass(frozen=True)
class Importance:
    """A client asks for the Fisher information of its adapter's layers over a table."""

    table: pa.Table


@dataclass(frozen=True)
class Compute:
    """A client asks for something that its adapter's model computes for it alone."""

    function: Callable[[Adapter], Any]


@dataclass(frozen=True)
class BatchedBackend:
    """The `ClientBackend` of one client of a batch: it asks for work, which is then computed for all members.

    Attributes:
        adapter: the member's own values.
        ask: waits for an answer to a `Train`, `Evaluate`, `Importance` or `Compute`.
    """

    adapter: Adapter
    ask: Ask

    def train(self, request: Train) -> Trained:
        answer: Trained = self.ask(request)
        return answer

    def evaluate(self, table: pa.Table, generating: bool, key: Sequence[Key], each: bool = False) -> Evaluation:
        answer: Evaluation = self.ask(Evaluate(table, generating, key, each))
        return answer

    def importance(self, table: pa.Table) -> dict[str, npt.NDArray[np.float64]]:
        answer: dict[str, npt.NDArray[np.float64]] = self.ask(Importance(table))
        return answer

    def compute(self, function: Callable[[Adapter], Result]) -> Result:
        answer: Result = self.ask(Compute(function))
        return answer


def run_batched(
    stack: AdapterStack,
    training_context: TrainingContext,
    loss_scale: float,
    clients: Sequence[Callable[[BatchedBackend], Result]],
) -> list[Result]:
    """Run the code of several clients, each as a member of the stack.

    Args:
        stack: has at least as many members as there are clients.
        loss_scale: as `TorchEngine`'s.
        clients: each client's code, given its backend.

    Returns:
        What the clients return, in their order.

    Raises:
        CannotBatch: these clients can only be trained one by one.
        Exception: whatever a client raises.
    """

    def serve(requests: Mapping[int, Any]) -> Mapping[int, Any]:
        slots = sorted(requests)
        first = requests[slots[0]]
        if isinstance(first, Train):  # a client that asks for another kind of training waits
            alike = {slot: request for slot, request in requests.items() if request.kind == first.kind}
            return train_batched(stack, alike, training_context, loss_scale)
        if isinstance(first, Compute):
            return {slot: request.function(_alone(stack, slot)) for slot, request in requests.items()}
        tables = {slot: requests[slot].table for slot in slots}
        if isinstance(first, Importance):
            return importance_batched(stack, tables, training_context)
        keys = {slot: requests[slot].key for slot in slots if requests[slot].generating}
        each = {slot for slot in slots if requests[slot].each}
        return evaluate_batched(stack, tables, training_context, keys, each)

    def as_member(index: int, client: Callable[[BatchedBackend], Result]) -> Callable[[Ask], Result]:
        return lambda ask: client(BatchedBackend(stack.member(index), ask))

    routines = [as_member(index, client) for index, client in enumerate(clients)]
    with stack.installed():
        return run_in_lockstep(routines, serve, (Evaluate, Importance, Compute, Train))


def train_batched(
    stack: AdapterStack, requests: Mapping[int, Train], training_context: TrainingContext, loss_scale: float = 1.0
) -> dict[int, Trained]:
    """Train the stack's members as `train_steps` would each alone.

    Args:
        requests: of one kind, by the member's place in the stack.

    Raises:
        TrainingError: as `train_steps`, for the first member by its place.
    """
    numbers = {slot: request.num_steps(training_context.train) for slot, request in requests.items()}
    slots = sorted(requests, key=lambda slot: -numbers[slot])  # members with most steps first: a prefix goes on
    ordered = [requests[slot] for slot in slots]
    schedules = [request.schedule(training_context) for request in ordered]
    with stack.adapter.narrowed(ordered[0].parts):
        groups = stack.adapter.trainable_groups()
        steered = Steered.of(stack.adapter, [request.steering for request in ordered], ordered[0].mean_gradient)
    columns = stack.columns_of(groups)
    values = stack.values[slots]
    moving = stack.gather(values, columns)
    optimizer = BatchedOptimizer(groups, moving, schedules)
    on_host = replace(training_context, device="cpu")  # batches are put together there
    steps = [loop.steps(request, on_host, SINGLE_PROCESS) for request in ordered]
    pending: list[Tensor] = []
    losses: list[list[float]] = [[] for _ in slots]
    seconds = np.zeros(len(slots))
    members, since = 0, perf_counter()
    stack.adapter.model.train()
    for index in range(numbers[slots[0]]):
        if members != (alive := sum(numbers[slot] > index for slot in slots)):
            seconds[:members] += (perf_counter() - since) / max(members, 1)
            members, since = alive, perf_counter()
            stack.use(values[:members], slots[:members], columns, moving[:members])
        pending.append(
            _backward(stack, slots[:members], ordered[:members], steps[:members], index, training_context, loss_scale)
        )
        gradients, present = stack.take_gradients()
        if loss_scale != 1:
            gradients.div_(loss_scale)
        if steered is not None:
            steered.steer(gradients, moving[:members], present)
        optimizer.step(gradients, index, present)
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == numbers[slots[0]]:
            _collect(pending, losses)
            finite = optimizer.finite()
            for member in sorted(range(len(slots)), key=lambda member: slots[member]):
                rates = schedules[member].rates(groups, len(losses[member]) - 1)
                loop.check_finite(losses[member], finite[member], rates, ordered[member])
    seconds[:members] += (perf_counter() - since) / members
    stack.adapter.model.eval()
    stack.write(slots, columns, moving)
    means = steered.means() if steered is not None else [{} for _ in slots]
    return {slot: Trained(losses[place], float(seconds[place]), means[place]) for place, slot in enumerate(slots)}


def evaluate_batched(
    stack: AdapterStack,
    tables: Mapping[int, pa.Table],
    training_context: TrainingContext,
    keys: Mapping[int, Sequence[Key]],
    each: Collection[int] = (),
) -> dict[int, Evaluation]:
    """Evaluate the stack's members on their tables, as `evaluate` would each alone.

    Args:
        keys: of the tables for which metrics of texts and of options are computed, by the member's place in the stack.
        each: places of the members that want every example's values.
    """
    found = {slot: unmeasured(training_context.metrics) for slot, table in tables.items() if table.num_rows == 0}
    full = {slot: table for slot, table in tables.items() if slot not in found}
    asked = {slot: table for slot, table in full.items() if slot in keys}
    options = {slot: options_of(own) for slot, own in asked.items() if has_options(own, training_context.metrics)}
    with evaluating(stack.adapter.model):
        units = _score_batched(stack, full, training_context)
        texts = generate_batched(stack, asked, training_context, keys)
        ranked = _score_batched(stack, options, training_context)
    likelihoods = {slot: log_likelihoods(ranked[slot].losses, own) for slot, own in options.items()}
    for slot, own in units.items():
        given = training_context.metrics, tables[slot], training_context.task, texts.get(slot), likelihoods.get(slot)
        found[slot] = summarise(own, *given, each=slot in each)
    return found


def _score_batched(
    stack: AdapterStack, tables: Mapping[int, pa.Table], training_context: TrainingContext
) -> dict[int, Units]:
    """Score the tables of the stack's members."""
    parts: dict[int, list[list[Tensor]]] = {slot: [] for slot in tables}
    for slots, joined in passes(stack, tables, training_context.evaluation.batch_size, by_length, training_context):
        scored = score_units(stack.adapter.model, joined.on(training_context.device), training_context.task)
        for slot, own in zip(slots, joined.own_units(training_context.device), strict=True):
            parts[slot].append([values[own] for values in scored])
    return {
        slot: Units(*(torch.cat(part).cpu().numpy() for part in zip(*own, strict=True))) for slot, own in parts.items()
    }


def generate_batched(
    stack: AdapterStack,
    tables: Mapping[int, pa.Table],
    training_context: TrainingContext,
    keys: Mapping[int, Sequence[Key]],
) -> dict[int, list[str]]:
    """Generate the texts of the stack's members, as `generate` would each alone; none unless the metric reads texts.

    Args:
        keys: of the tables, for sampled text.
    """
    model, decoding = stack.adapter.model, training_context.decoding
    if decoding is None:
        return {}
    size, device = training_context.evaluation.batch_size, training_context.device
    pad_token_id = training_context.pad_token_id
    if reads_left_padding(model):  # one prompt at a time anyway
        return {
            slot: generate(_alone(stack, slot).model, table, decoding, size, pad_token_id, device, keys[slot])
            for slot, table in tables.items()
        }
    prompts = {slot: prompts_alone(table) for slot, table in tables.items()}
    orders = {slot: by_length(table) for slot, table in prompts.items()}
    texts = {slot: [""] * table.num_rows for slot, table in tables.items()}
    copies = decoding.options.num_beams
    for index, (slots, joined) in enumerate(
        passes(stack, prompts, size, by_length, training_context, left_pad=True, copies=copies)
    ):
        rows = [orders[slot][index * size : (index + 1) * size].tolist() for slot in slots]
        draws = [decoding.draws(keys[slot], own) for slot, own in zip(slots, rows, strict=True)]
        found = generate_batch(
            model,
            joined.on(device),
            decoding,
            pad_token_id,
            _filled(draws, joined.rows),
            joined.client_batch(slots, device).real,
        )
        for member, (slot, own) in enumerate(zip(slots, rows, strict=True)):
            for row, text in zip(own, found[member * joined.rows :], strict=False):
                texts[slot][row] = text
    return texts


def _filled(draws: Sequence[npt.NDArray[np.float64] | None], rows: int) -> npt.NDArray[np.float64] | None:
    """Return the members' draws, [members · rows, ...], with zeros at rows that only fill up the batch."""
    drawn = [own for own in draws if own is not None]
    if not drawn:
        return None
    return np.concatenate([np.pad(own, ((0, rows - len(own)), (0, 0))) for own in drawn])


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
    for slots, joined in passes(stack, tables, training_context.train.batch_size, lambda _: None, training_context):
        batch = joined.on(training_context.device)
        for path, gradient in shift_gradients(
            stack.adapter.model, stack.adapter.targets, batch, training_context.task
        ).items():
            squares = gradient.double().square().view(len(slots), joined.rows, -1)
            for member, (slot, (rows, _)) in enumerate(zip(slots, joined.shapes, strict=True)):
                own = squares[member, :rows].sum(0)
                totals[slot][path] = totals[slot][path] + own if path in totals[slot] else own
    return {slot: mean_importance(totals[slot], tables[slot].num_rows) for slot in sorted(tables)}


def _backward(
    stack: AdapterStack,
    slots: Sequence[int],
    asked: Sequence[Train],
    steps: Sequence[Iterator[Step]],
    index: int,
    training_context: TrainingContext,
    loss_scale: float,
) -> Tensor:
    """Compute one step's gradients of every member, into the stack; return every member's mean loss, [members]."""
    taken = [next(step) for step in steps]
    context = stack.adapter.context
    total = torch.zeros(len(taken), device=training_context.device)
    for micro in range(max(len(step.micro_batches) for step in taken)):
        parts = [step.micro_batches.get(micro) or _empty_batch(step) for step in taken]
        joined = join(parts, training_context.task, training_context.pad_token_id)
        keys = [dropout_key(training_context, request, index, micro) for request in asked]
        context.client_batch = ClientBatch(
            tuple(slots), joined.shapes, joined.rows, training_context.device, tuple(keys)
        )
        scored = score(stack.adapter.model, joined.on(training_context.device), training_context.task)
        weights, member = (
            part.to(training_context.device) for part in joined.weights([step.num_units for step in taken])
        )
        losses = torch.zeros_like(total).index_add(0, member, scored.losses * weights)
        if losses.requires_grad:  # else interventions edit no token of these prompts
            (losses.sum() * loss_scale).backward()  # type: ignore[no-untyped-call]
        total += losses.detach()
    return total


def _empty_batch(step: Step) -> Batch:
    """Return a batch without examples, for a member whose step has fewer micro-batches than others'."""
    return {name: tensor[:0] for name, tensor in step.micro_batches[0].items()}


def _collect(pending: list[Tensor], losses: Sequence[list[float]]) -> None:
    """Append the pending steps' losses, each [members that took the step], to the members' lists. The host waits for
    the device once."""
    numbers = iter(torch.cat(pending).tolist())
    for step in pending:
        for member in range(len(step)):
            losses[member].append(next(numbers))
    pending.clear()


def _alone(stack: AdapterStack, slot: int) -> Adapter:
    """Return the adapter, whose model computes for one member alone until the stack is used again."""
    stack.use(stack.values[slot : slot + 1], [slot])
    stack.adapter.context.client_batch = ClientBatch((slot,), (), 0, stack.values.device)
    return stack.adapter
