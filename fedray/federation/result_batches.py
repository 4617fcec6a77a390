"""What leaves a worker: clients that finished together. Their next states and trained adapters are written to the run's
folder here; what a method only averages is averaged here, and what must not be averaged is kept out."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fedray.aggregation.pairwise import Node, PairwiseMean, leaf
from fedray.data.shards import Shard
from fedray.errors import ConfigError, FedrayError, TrainingError
from fedray.federation.failures import TaskFailure
from fedray.federation.update_checks import objection
from fedray.federation.worker import ClientTask, Outcome, WorkerSetup
from fedray.methods.protocol import Update, averages
from fedray.methods.registry import build_method
from fedray.storage.client_states import StateFiles, StateRef
from fedray.storage.paths import safe_name
from fedray.storage.state_tree import float_arrays, num_bytes, save_tensors, with_arrays
from fedray.types import ClientId

BATCH_SECONDS = 0.1
BATCH_CLIENTS = 256
BATCH_BYTES = 100_000
"""A block is sent on when it has lasted this long (longer where many actors send: `ClientPool`), or has so many clients
or bytes of states and of updates that travel one by one: a death loses one block."""

Given = tuple[Sequence[ClientTask], Sequence[Any], Sequence[StateRef | None], Sequence[Shard]]
"""A group's assignments, downlinks, states' places and shards."""

Train = Callable[[Sequence[ClientTask], Sequence[Any], Sequence[Any], Sequence[Shard]], Iterable[tuple[Outcome, Any]]]
"""Given a group's assignments, downlinks, states and shards; see `Worker.train_many`."""


def state_files(job: WorkerSetup) -> StateFiles | None:
    """Return where the states of the method's clients are; None where nothing can be kept.

    Raises:
        ConfigError: this node does not see the run's folder.
    """
    if job.folder is None:
        return None
    folder = job.folder / "states" / job.entry.key
    return StateFiles(folder, job.config.checkpoint.every > 0)


@dataclass(frozen=True)
class ResultBatch:
    """Clients of one tier that finished together.

    states: where each one's next state is; None where it keeps none. means: of what they sent up, where the method
    averages it; their outcomes' payloads are None then. shape: one such payload, its arrays empty. failures: those of
    whom nothing came. groups: how many were served, failed ones too. seconds: since the block before. last: nothing
    comes after it.
    """

    outcomes: tuple[Outcome, ...]
    states: tuple[StateRef | None, ...]
    means: tuple[Node, ...]
    shape: Any
    failures: tuple[TaskFailure, ...]
    groups: int
    seconds: float
    last: bool


class ResultBatcher:
    """Serves groups of clients in blocks, with one method on one tier.

    survives: whether an exception leaves the worker fit for other clients; else it is passed on.

    Raises:
        ConfigError: this node does not see the run's folder.
    """

    def __init__(self, job: WorkerSetup, train: Train, survives: bool = True):
        self._train, self._survives = train, survives
        self._checks, self._expected = job.config.clients.update_checks, job.uplink
        method = build_method(job.config, job.entry, job.tier)
        self._averages = None if self._checks.compare else averages(method)
        self._files = state_files(job)
        self._adapters = job.folder and job.folder / "adapters" / job.entry.key / "clients"

    def serve(self, groups: Sequence[Given], lasting: float = BATCH_SECONDS) -> Iterator[ResultBatch]:
        """Let the groups of clients take their turns, in order; yield blocks of whole groups.

        lasting: seconds after which a block ends.
        """
        found = _Found()
        for left, group in enumerate(groups, start=1 - len(groups)):
            self._serve(group, found)
            seconds = perf_counter() - found.started
            if not left or seconds > lasting or len(found.states) >= BATCH_CLIENTS or found.size > BATCH_BYTES:
                places = self._places(group[0][0], found.states)
                yield ResultBatch(
                    outcomes=tuple(found.outcomes),
                    states=places,
                    means=found.means.take(),
                    shape=found.shape,
                    failures=tuple(found.failures),
                    groups=found.groups,
                    seconds=perf_counter() - found.started,
                    last=not left,
                )
                found = _Found()

    def _serve(self, group: Given, found: "_Found") -> None:
        """Let one group take its turns; add what it brings to what was found."""
        assignments, downlinks, refs, shards = group
        found.groups += 1
        try:
            states = [None] * len(refs) if self._files is None else self._files.read(refs)
            turns = list(self._train(assignments, downlinks, states, shards))
        except (ConfigError, torch.AcceleratorError):  # no client's fault, and no place for others
            raise
        except Exception as error:
            if not self._survives:
                raise
            found.failures.append(failure_of([assignment.client.id for assignment in assignments], error))
            return
        for assignment, (outcome, state) in zip(assignments, turns, strict=True):
            client = assignment.client.id
            if assignment.keep == "state":
                if (cause := objection(outcome.update.payload, self._checks, self._expected)) is not None:
                    found.failures.append(TaskFailure((client,), cause, rejected=True))
                    continue
                if self._averages:
                    found.shape = self._add(found.means, assignment, outcome.update, found.shape)
            found.outcomes.append(self._settled(assignment, outcome))
            found.states.append(state)
            found.size += num_bytes(state) + (0 if self._averages else outcome.uplink_bytes)

    def _add(self, means: PairwiseMean, assignment: ClientTask, update: Update[Any], shape: Any) -> Any:
        """Add what the client sent up to the means; return its shape, the one that is known already if there is one."""
        arrays = float_arrays(update.payload)
        weight = update.num_examples if self._averages == "examples" else 1
        try:
            means.add(leaf(assignment.position, weight, arrays))
        except ValueError as error:
            raise TrainingError(
                f"client {update.client.id!r}, round {assignment.server_round}: its update cannot be averaged: {error}"
            ) from error
        if shape is not None:
            return shape
        return with_arrays(update.payload, iter([np.empty(0, np.float32)] * len(arrays)))

    def _settled(self, assignment: ClientTask, outcome: Outcome) -> Outcome:
        """Write the adapter that the client takes home; return what travels. Payloads do where each is aggregated."""
        if assignment.keep == "adapter" and self._adapters is not None and outcome.tensors is not None:
            save_tensors(self._adapters / f"{safe_name(assignment.client.id)}.safetensors", outcome.tensors)
        if assignment.keep == "state" and not self._averages:
            return outcome
        update = outcome.update
        return replace(outcome, tensors=None, update=Update(update.client, update.num_examples, None))

    def _places(self, first: ClientTask, states: Sequence[Any]) -> tuple[StateRef | None, ...]:
        if self._files is None or first.keep != "state":
            return (None,) * len(states)
        return tuple(self._files.write(first.server_round, states))


class _Found:
    """What a block has so far. size: bytes of states, and of updates that travel one by one."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.states: list[Any] = []
        self.failures: list[TaskFailure] = []
        self.means = PairwiseMean()
        self.shape: Any = None
        self.groups = 0
        self.size = 0
        self.started = perf_counter()


def failure_of(clients: Sequence[ClientId], error: Exception) -> TaskFailure:
    """Return what an exception says of the clients in whose turns it was raised."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    if isinstance(error, FedrayError):
        return TaskFailure(tuple(clients), f"{error}{notes}", non_retryable=isinstance(error, TrainingError))
    trace = "".join(traceback.format_exception(error))
    return TaskFailure(tuple(clients), f"{type(error).__name__}: {error}{notes}", trace)
