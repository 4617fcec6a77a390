"""A pool that trains clients in this process, one after another, without Ray: for tests, debuggers and notebooks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedray.data.shards import Shard
from fedray.federation.failures import FailedAttempt
from fedray.federation.result_batches import ResultBatch, ResultBatcher, state_files
from fedray.federation.tasks import ClientTask, WorkerSetup
from fedray.federation.work_queue import WorkQueue, task_groups
from fedray.federation.worker import Worker
from fedray.methods.protocol import Initial
from fedray.storage.client_states import StateFiles, StateRef
from fedray.training.metering import MemoryUse, gpu_memory
from fedray.types import ClientId


class LocalPool:
    """A pool of one worker per tier."""

    def __init__(self, shards: Mapping[ClientId, Shard]):
        self.shards = shards
        self.workers: dict[str, Worker] = {}
        self._widths: dict[str, int] = {}
        self._batchers: dict[str, ResultBatcher] = {}
        self._files: StateFiles | None = None

    def setup(self, setups: Mapping[str, WorkerSetup]) -> Initial:
        """Make a worker per tier ready for a method and return the common starting point."""
        self.workers = {tier: self.workers.get(tier, Worker()) for tier in setups}
        self._files = state_files(next(iter(setups.values())))
        for tier, setup in setups.items():
            survives = setup.config.clients.on_failure == "drop"
            self._batchers[tier] = ResultBatcher(setup, self.workers[tier].train_together, survives)
            self.workers[tier].setup(setup)
            self._widths[tier] = setup.config.clients.tier(tier).fuse_width
        return next(iter(self.workers.values())).initial()

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ResultBatch | FailedAttempt]:
        """Yield results tier by tier, in the order of the tasks, and failed attempts.

        There is no other actor, so a failed task is not run again; but clients that failed together get one attempt
        each alone.

        Raises:
            Exception: a client's code failed, and its failure ends the run. The exception is passed on unchanged, so
                that a debugger stops where it was raised.
        """
        for tier, groups in task_groups([self._with_shard(task) for task in tasks], self._widths).items():
            queue = WorkQueue(groups, max_failures=0)
            while queue:
                batch = queue.next_batch(actors=1)
                for results in self._batchers[tier].serve(batch):
                    if results.results:
                        yield results
                    for failure in results.failures:
                        yield queue.fail(failure, batch)

    def actors(self, tier: str) -> int:
        """Return 1: each tier has one worker."""
        return 1

    def width_seconds(self, tasks: Sequence[ClientTask]) -> dict[int, float]:
        """See `Worker.width_seconds`."""
        worker = self.workers[tasks[0].client.tier]
        return worker.width_seconds([self._with_shard(task) for task in tasks])

    def gpu_memory(self, tier: str) -> int | None:
        """Return the bytes of a GPU that this process may take; all tiers share them."""
        return gpu_memory()

    def fetch(self, refs: Sequence[StateRef]) -> list[Any]:
        """Return the states."""
        return [] if self._files is None else self._files.read(refs)

    def forget(self, refs: Sequence[StateRef]) -> None:
        """Delete states that are not needed any more."""
        if self._files is not None:
            self._files.forget(refs)

    def memory(self) -> dict[str, list[MemoryUse]]:
        """Return the peak memory of each tier's worker. The workers share this process, so all of them report the same
        host memory."""
        return {tier: [worker.memory()] for tier, worker in self.workers.items()}

    def _with_shard(self, task: ClientTask) -> ClientTask:
        return task._replace(shard=self.shards[task.client.id])
