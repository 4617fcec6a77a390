"""Clients in this process, one after another, without Ray: for tests, debuggers and notebooks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedray.data.shards import Shard
from fedray.federation.failures import FailedAttempt
from fedray.federation.result_batches import Given, ResultBatch, ResultBatcher, state_files
from fedray.federation.work_queue import TaskGroup, WorkQueue, task_groups
from fedray.federation.worker import ClientTask, Worker, WorkerSetup
from fedray.methods.protocol import Initial
from fedray.storage.client_states import StateFiles, StateRef
from fedray.training.metering import MemoryUse
from fedray.types import ClientId


class LocalPool:
    """A pool of one worker per tier."""

    def __init__(self, shards: Mapping[ClientId, Shard]):
        self.shards = shards
        self.workers: dict[str, Worker] = {}
        self._widths: dict[str, int] = {}
        self._blocks: dict[str, ResultBatcher] = {}
        self._files: StateFiles | None = None

    def setup(self, jobs: Mapping[str, WorkerSetup]) -> Initial:
        """Make a worker per tier ready for a method and return the common starting point."""
        self.workers = {tier: self.workers.get(tier, Worker()) for tier in jobs}
        self._files = state_files(next(iter(jobs.values())))
        for tier, job in jobs.items():
            survives = job.config.clients.on_failure == "drop"
            self._blocks[tier] = ResultBatcher(job, self.workers[tier].train_many, survives)
            self.workers[tier].setup(job)
            self._widths[tier] = job.config.clients.tier(tier).fuse_width
        return next(iter(self.workers.values())).initial()

    def train(
        self, assignments: Sequence[ClientTask], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, StateRef]
    ) -> Iterator[ResultBatch | FailedAttempt]:
        """Yield clients tier by tier, in the order of the assignments, and attempts that came to nothing. There is no
        elsewhere: nobody is run again, but those who failed together each alone.

        Raises:
            Whatever a client's code raises, if its failure ends the run: a debugger stops where it happened.
        """
        for tier, entries in task_groups(assignments, self._widths).items():
            chunks = WorkQueue(entries, 0)
            while chunks:
                chunk = chunks.take(1, math.inf)
                for block in self._blocks[tier].serve([self._given(group, downlinks, states) for group in chunk]):
                    if block.outcomes:
                        yield block
                    for failure in block.failures:
                        yield chunks.take_back(failure, chunk)

    def _given(self, group: TaskGroup, downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, StateRef]) -> Given:
        ids = [assignment.client.id for assignment in group]
        return group, [downlinks[id] for id in ids], [states.get(id) for id in ids], [self.shards[id] for id in ids]

    def actors(self, tier: str) -> int:
        return 1

    def width_seconds(self, assignments: Sequence[ClientTask], downlinks: Mapping[ClientId, Any]) -> dict[int, float]:
        """See `Worker.width_seconds`."""
        ids = [assignment.client.id for assignment in assignments]
        given = [downlinks[id] for id in ids], [None] * len(ids), [self.shards[id] for id in ids]
        return self.workers[assignments[0].client.tier].width_seconds(assignments, *given)

    def fetch(self, refs: Sequence[StateRef]) -> list[Any]:
        """Return the states."""
        return [] if self._files is None else self._files.read(refs)

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Delete states that nobody needs any more."""
        if self._files is not None:
            self._files.forget(refs)

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Each tier's worker; they share this process, so that all of them say the same of the host."""
        return {tier: [worker.memory()] for tier, worker in self.workers.items()}
