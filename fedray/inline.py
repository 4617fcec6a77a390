"""Clients in this process, one after another, without Ray: for tests, debuggers and notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedray.chunks import groups
from fedray.data.shards import Shard
from fedray.methods.protocol import Initial
from fedray.training.metering import MemoryUse
from fedray.types import ClientId
from fedray.worker import Assignment, Job, Outcome, Worker


class InlinePool:
    """A pool of one worker per tier; a handle is the state itself."""

    def __init__(self, shards: Mapping[ClientId, Shard]):
        self.shards = shards
        self.workers: dict[str, Worker] = {}
        self._widths: dict[str, int] = {}

    def setup(self, jobs: Mapping[str, Job]) -> Initial:
        """Make a worker per tier ready for a method and return the common starting point."""
        self.workers = {tier: self.workers.get(tier, Worker()) for tier in jobs}
        for tier, job in jobs.items():
            self.workers[tier].setup(job)
            self._widths[tier] = job.config.clients.tier(tier).fuse_width
        return next(iter(self.workers.values())).initial()

    def train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, Any]
    ) -> Iterator[tuple[Outcome, Any]]:
        """Yield outcomes and next states tier by tier, in the order of the assignments."""
        for tier, entries in groups(assignments, self._widths).items():
            for group in entries:
                ids = [assignment.client.id for assignment in group]
                yield from self.workers[tier].train_many(
                    group,
                    [downlinks[id] for id in ids],
                    [states.get(id) for id in ids],
                    [self.shards[id] for id in ids],
                )

    def fuse_width(self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any]) -> int:
        """Return how many clients of the assignments' tier are best trained in one step."""
        ids = [assignment.client.id for assignment in assignments]
        given = [downlinks[id] for id in ids], [None] * len(ids), [self.shards[id] for id in ids]
        return self.workers[assignments[0].client.tier].fuse_width(assignments, *given)

    def fetch(self, handle: Any) -> Any:
        return handle

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Each tier's worker; they share this process, so that all of them say the same of the host."""
        return {tier: [worker.memory()] for tier, worker in self.workers.items()}
