"""What leaves a worker: clients that finished together. Their next states and trained adapters are written to the run's
folder here; what a method only averages is averaged here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fedray.aggregation.pairwise import Node, PairwiseMean, leaf
from fedray.codec import state_classes
from fedray.data.shards import Shard
from fedray.errors import TrainingError
from fedray.methods.protocol import Update, averages
from fedray.methods.registry import build_method
from fedray.state import float_arrays, num_bytes, save_tensors, with_arrays
from fedray.state_files import StateFiles, StateRef
from fedray.worker import Assignment, Job, Outcome

BLOCK_SECONDS = 0.1
BLOCK_CLIENTS = 256
BLOCK_BYTES = 100_000
"""A block is sent on when it has lasted this long (longer where many actors send: `ClientPool`), or has so many clients
or bytes of states and of updates that travel one by one: a death loses one block."""

Given = tuple[Sequence[Assignment], Sequence[Any], Sequence[StateRef | None], Sequence[Shard]]
"""A group's assignments, downlinks, states' places and shards."""

Train = Callable[[Sequence[Assignment], Sequence[Any], Sequence[Any], Sequence[Shard]], Iterable[tuple[Outcome, Any]]]
"""Given a group's assignments, downlinks, states and shards; see `Worker.train_many`."""


def state_files(job: Job) -> StateFiles | None:
    """Return where the states of the method's clients are; None where nothing can be kept.

    Raises:
        ConfigError: this node does not see the run's folder.
    """
    if job.folder is None:
        return None
    method = build_method(job.config, job.entry, job.tier)
    return StateFiles(job.folder / "states" / job.entry.key, state_classes(type(method)))


@dataclass(frozen=True)
class Block:
    """Clients of one tier that finished together.

    states: where each one's next state is; None where it keeps none. means: of what they sent up, where the method
    averages it; their outcomes' payloads are None then. shape: one such payload, its arrays empty. seconds: since the
    block before. last: nothing comes after it.
    """

    outcomes: tuple[Outcome, ...]
    states: tuple[StateRef | None, ...]
    means: tuple[Node, ...]
    shape: Any
    seconds: float
    last: bool


class Blocks:
    """Serves groups of clients in blocks, with one method on one tier.

    Raises:
        ConfigError: this node does not see the run's folder.
    """

    def __init__(self, job: Job, train: Train):
        self._train, self._averages = train, averages(build_method(job.config, job.entry, job.tier))
        self._files = state_files(job)
        self._adapters = (job.folder or Path()) / "adapters" / job.entry.key / "clients"

    def serve(self, groups: Sequence[Given], lasting: float = BLOCK_SECONDS) -> Iterator[Block]:
        """Let the groups of clients take their turns, in order; yield blocks of whole groups.

        lasting: seconds after which a block ends.
        """
        outcomes: list[Outcome] = []
        after: list[Any] = []
        means, shape, size, started = PairwiseMean(), None, 0, perf_counter()
        for left, (assignments, downlinks, refs, shards) in enumerate(groups, start=1 - len(groups)):
            states = [None] * len(refs) if self._files is None else self._files.read(refs)
            turns = self._train(assignments, downlinks, states, shards)
            for assignment, (outcome, state) in zip(assignments, turns, strict=True):
                if self._averages and assignment.keep == "state":
                    shape = self._add(means, assignment, outcome.update, shape)
                outcomes.append(self._settled(assignment, outcome))
                after.append(state)
                size += num_bytes(state) + (0 if self._averages else outcome.uplink_bytes)
            seconds = perf_counter() - started
            if not left or seconds > lasting or len(after) >= BLOCK_CLIENTS or size > BLOCK_BYTES:
                places = self._places(assignments[0], after)
                yield Block(tuple(outcomes), places, means.take(), shape, perf_counter() - started, not left)
                outcomes, after, size, started = [], [], 0, perf_counter()

    def _add(self, means: PairwiseMean, assignment: Assignment, update: Update[Any], shape: Any) -> Any:
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

    def _settled(self, assignment: Assignment, outcome: Outcome) -> Outcome:
        """Write the adapter that the client takes home; return what travels. Payloads do where each is aggregated."""
        if assignment.keep == "adapter" and self._files is not None and outcome.tensors is not None:
            save_tensors(self._adapters / f"{assignment.client.id}.safetensors", outcome.tensors)
        if assignment.keep == "state" and not self._averages:
            return outcome
        update = outcome.update
        return replace(outcome, tensors=None, update=Update(update.client, update.num_examples, None))

    def _places(self, first: Assignment, states: Sequence[Any]) -> tuple[StateRef | None, ...]:
        if self._files is None or first.keep != "state":
            return (None,) * len(states)
        return tuple(self._files.write(first.server_round, states))
