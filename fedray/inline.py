"""Clients in this process, one after another, without Ray: for tests, debuggers and notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedray.data.shards import Shard
from fedray.methods.protocol import Initial
from fedray.types import ClientId
from fedray.worker import Assignment, Job, Outcome, Worker


class InlinePool:
    """A pool of one worker; a handle is the state itself."""

    def __init__(self, shards: Mapping[ClientId, Shard]):
        self.shards = shards
        self.worker = Worker()

    def setup(self, job: Job) -> Initial:
        """Make the worker ready for a method and return the common starting point."""
        self.worker.setup(job)
        return self.worker.initial()

    def train(
        self, assignments: Sequence[Assignment], downlinks: Mapping[ClientId, Any], states: Mapping[ClientId, Any]
    ) -> Iterator[tuple[Outcome, Any]]:
        """Yield outcomes and next states in the order of the assignments."""
        for assignment in assignments:
            id = assignment.client.id
            yield self.worker.train(assignment, downlinks[id], states.get(id), self.shards[id])

    def fetch(self, handle: Any) -> Any:
        return handle
