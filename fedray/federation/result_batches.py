"""Batches of client results, as a worker returns them.

On the way, the clients' next states and trained adapters are written to the run's folder, unusable updates are
rejected, and what a method only averages is averaged.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from fedray.aggregation.pairwise import Node, PairwiseMean, leaf
from fedray.errors import ConfigError, FedrayError, StorageError, TrainingError
from fedray.federation.failures import TaskFailure
from fedray.federation.tasks import ClientResult, ClientTask, WorkerSetup
from fedray.federation.update_checks import objection
from fedray.methods.protocol import averages
from fedray.methods.registry import build_method
from fedray.storage.client_states import StateFiles
from fedray.storage.paths import safe_name
from fedray.storage.state_tree import Array, float_arrays, leaves, num_bytes, save_tensors, with_arrays
from fedray.types import ClientId, round_number

BATCH_SECONDS = 0.1
BATCH_CLIENTS = 256
BATCH_BYTES = 100_000
"""A batch is sent once it has lasted this long, or has this many clients, or this many bytes of states and of updates
that travel one by one. An actor that dies loses at most one batch."""

Train = Callable[[Sequence[ClientTask]], Iterable[ClientResult]]
"""Runs the tasks of one group; see `Worker.train_together`."""


def state_files(setup: WorkerSetup) -> StateFiles | None:
    """Return where the states of the method's clients are; None if nothing is kept.

    Raises:
        ConfigError: this node does not see the run's folder.
    """
    if setup.folder is None:
        return None
    return StateFiles(setup.folder / "states" / setup.entry.key, setup.config.checkpoint.every > 0)


@dataclass(frozen=True)
class ResultBatch:
    """The results of clients of one tier that finished together.

    Attributes:
        means: partial means of the clients' payloads if the method averages them; the results' payloads are None then.
        structure: one such payload with empty arrays.
        failures: tasks without a result.
        groups: how many groups of tasks were served, failed ones included.
        last: whether this is the last batch of its task batch.
        seconds: that the actor took.
    """

    results: tuple[ClientResult, ...]
    means: tuple[Node, ...]
    structure: Any
    failures: tuple[TaskFailure, ...]
    groups: int
    last: bool
    seconds: float


class ResultBatcher:
    """Serves groups of tasks, with one method on one tier, and returns their results in batches.

    Args:
        train: runs the tasks of one group.
        survives: whether the worker can serve other clients after an exception; if not, the exception is passed on.

    Raises:
        ConfigError: this node does not see the run's folder.
    """

    def __init__(self, setup: WorkerSetup, train: Train, survives: bool = True):
        self._train, self._survives = train, survives
        self._checks, self._expected = setup.config.clients.update_checks, setup.uplink
        method = build_method(setup.config, setup.entry, setup.tier)
        self._averages = None if self._checks.compare else averages(method)
        self._files = state_files(setup)
        self._adapters = setup.folder and setup.folder / "adapters" / setup.entry.key / "clients"

    def serve(self, groups: Sequence[Sequence[ClientTask]], seconds: float = BATCH_SECONDS) -> Iterator[ResultBatch]:
        """Run the groups in order and yield batches of whole groups.

        Args:
            groups: tasks with their downlinks and shards, and the places of their states.
            seconds: how long a batch lasts at most.
        """
        collected = _Collected()
        for left, group in enumerate(groups, start=1 - len(groups)):
            self._serve(group, collected)
            full = len(collected.results) >= BATCH_CLIENTS or collected.num_bytes > BATCH_BYTES
            if not left or full or perf_counter() - collected.started > seconds:
                yield self._batch(collected, last=not left)
                collected = _Collected()

    def _serve(self, group: Sequence[ClientTask], collected: "_Collected") -> None:
        """Run one group and add its results to the batch."""
        collected.groups += 1
        try:
            tasks = group
            if self._files is not None:
                states = self._files.read([task.state for task in group])
                tasks = [task._replace(state=state) for task, state in zip(group, states, strict=True)]
            results = list(self._train(tasks))
        except (ConfigError, StorageError, torch.AcceleratorError):  # not the client's fault, and others would have it
            raise
        except Exception as error:
            if not self._survives:
                raise
            collected.failures.append(failure_of([task.client.id for task in group], error))
            return
        for task, result in zip(group, results, strict=True):
            self._collect(task, result, collected)

    def _collect(self, task: ClientTask, result: ClientResult, collected: "_Collected") -> None:
        if task.keep == "state":
            found = list(leaves(result.payload))
            if (cause := objection(found, self._checks, self._expected)) is not None:
                collected.failures.append(TaskFailure((task.client.id,), cause, rejected=True))
                return
            if self._averages:
                collected.structure = self._add(task, result, float_arrays(found), collected)
        if task.keep == "adapter" and self._adapters is not None and result.adapter is not None:
            save_tensors(self._adapters / f"{safe_name(task.client.id)}.safetensors", result.adapter)
        travels = task.keep == "state" and not self._averages
        collected.num_bytes += num_bytes(result.state) + (result.uplink_bytes if travels else 0)
        collected.keeps_state = task.keep == "state"
        collected.results.append(result if travels else result._replace(payload=None, adapter=None))

    def _add(self, task: ClientTask, result: ClientResult, arrays: list[Array], collected: "_Collected") -> Any:
        """Add the arrays of the client's payload to the means; return the structure of the batch's payloads."""
        weight = result.num_examples if self._averages == "examples" else 1
        try:
            collected.means.add(leaf(task.position, weight, arrays))
        except ValueError as error:
            raise TrainingError(
                f"client {task.client.id!r}, round {round_number(task.server_round)}: "
                f"its update cannot be averaged: {error}"
            ) from error
        if collected.structure is not None:
            return collected.structure
        return with_arrays(result.payload, iter([np.empty(0, np.float32)] * len(arrays)))

    def _batch(self, collected: "_Collected", last: bool) -> ResultBatch:
        """Write the clients' next states and return the batch, in which they are replaced by their places."""
        results = collected.results
        places: Sequence[Any] = [None] * len(results)
        if self._files is not None and collected.keeps_state:
            places = self._files.write(results[0].server_round, [result.state for result in results])
        return ResultBatch(
            results=tuple(result._replace(state=place) for result, place in zip(results, places, strict=True)),
            means=collected.means.take(),
            structure=collected.structure,
            failures=tuple(collected.failures),
            groups=collected.groups,
            last=last,
            seconds=perf_counter() - collected.started,
        )


class _Collected:
    """The results of a batch so far.

    Attributes:
        keeps_state: whether the clients' next states are kept.
        num_bytes: bytes of states, and of updates that travel one by one.
    """

    def __init__(self) -> None:
        self.results: list[ClientResult] = []
        self.failures: list[TaskFailure] = []
        self.means = PairwiseMean()
        self.structure: Any = None
        self.keeps_state = False
        self.groups = 0
        self.num_bytes = 0
        self.started = perf_counter()


def failure_of(clients: Sequence[ClientId], error: Exception) -> TaskFailure:
    """Return the failure that an exception means for the clients in whose tasks it was raised."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    if isinstance(error, FedrayError):
        return TaskFailure(tuple(clients), f"{error}{notes}", non_retryable=isinstance(error, TrainingError))
    trace = "".join(traceback.format_exception(error))
    return TaskFailure(tuple(clients), f"{type(error).__name__}: {error}{notes}", trace)
