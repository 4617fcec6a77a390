"""How a round's client tasks are handed to the actors of a tier.

Clients that are trained in one step form a group: `fuse` consecutive ones of a tier, the largest first, so that they
have similar numbers of steps. The groups follow from the cohort alone, and a group is never split: results depend, in
their last bits, on who is trained together.

Actors receive task batches, some groups each, that shrink towards the round's end (guided self-scheduling,
Polychronopoulos and Kuck 1987): a thousand small clients cost few messages, and no actor works alone for long at the
end. After an actor died, the groups that it had not finished are handed out one by one, so that a group that kills its
actor is found and others are not blamed for it. A group that has failed too often is exhausted; if it has several
clients, each gets one more attempt alone.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedray.federation.failures import FailedAttempt, TaskFailure
from fedray.federation.tasks import ClientTask
from fedray.types import Client, ClientId

TaskGroup = tuple[ClientTask, ...]

SHARE = 2
"""A task batch has 1 / (SHARE · actors) of the remaining work."""


def task_groups(tasks: Sequence[ClientTask], widths: Mapping[str, int]) -> dict[str, list[TaskGroup]]:
    """Return each tier's groups, in the order of the tasks.

    Args:
        widths: by tier, how many clients are trained in one step.
    """
    by_tier: dict[str, list[ClientTask]] = {tier: [] for tier in widths}
    for task in tasks:
        by_tier[task.client.tier].append(task)
    return {
        tier: [tuple(entries[start : start + widths[tier]]) for start in range(0, len(entries), widths[tier])]
        for tier, entries in by_tier.items()
    }


class WorkQueue:
    """The unfinished groups of one round on one tier.

    Args:
        groups: largest first.
        max_failures: how often a group is run again after it failed.
    """

    def __init__(self, groups: Sequence[TaskGroup], max_failures: int) -> None:
        self._waiting = deque(groups)
        self._remaining = sum(map(_work, groups))
        self._alone: deque[tuple[TaskGroup, Any]] = deque()  # with the actor on which it failed
        self._max_failures = max_failures
        self._failures: Counter[tuple[ClientId, ...]] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._alone)

    def next_batch(self, actors: int, actor: Any = None, least: float = 0.0, idle: int = 1) -> list[TaskGroup]:
        """Return the next groups; empty if every remaining one already failed on this actor and other actors exist.

        Args:
            actors: how many share the remaining work.
            actor: the one that receives the groups.
            least: work that a batch should have at least (`Throughput`), if there is enough for all idle actors.
            idle: how many actors, this one included, wait for work.
        """
        for entry in self._alone:
            if entry[1] is None or entry[1] is not actor or actors == 1:
                self._alone.remove(entry)
                return [entry[0]]
        if not self._waiting:
            return []
        size = max(self._remaining / (SHARE * actors), min(least, self._remaining / idle))
        batch = [self._waiting.popleft()]
        work = _work(batch[0])
        while self._waiting and work + (following := _work(self._waiting[0])) <= size:
            batch.append(self._waiting.popleft())
            work += following
        self._remaining -= work
        return batch

    def requeue(self, groups: Sequence[TaskGroup]) -> None:
        """Take back groups that an actor did not finish, without counting it as their failure."""
        self._alone.extend((group, None) for group in groups)

    def record_failure(self, group: TaskGroup, actor: Any = None, non_retryable: bool = False) -> tuple[int, bool]:
        """Take back a group that failed on an actor.

        Args:
            non_retryable: whether it would fail again.

        Returns:
            How often the group has failed, and whether it is exhausted.
        """
        ids = ids_of(group)
        self._failures[ids] += 1
        number = self._failures[ids]
        if number <= self._max_failures and not non_retryable:
            self._alone.append((group, actor))
            return number, False
        if len(group) == 1:
            return number, True
        for task in group:
            self._failures[(task.client.id,)] = max(number, self._max_failures)
            self._alone.append(((task,), None))
        return number, False

    def fail(
        self, failure: TaskFailure, batch: Sequence[TaskGroup], actor: Any = None, node: str = ""
    ) -> FailedAttempt:
        """Take back the group of a batch whose tasks failed in an actor that continues, and return the failed attempt.

        A client whose update was rejected is exhausted at once; the others of its group are not affected.
        """
        group = next(group for group in batch if failure.clients[0] in ids_of(group))
        number, exhausted = (1, True) if failure.rejected else self.record_failure(group, actor, failure.non_retryable)
        return FailedAttempt(
            group[0].server_round,
            failure.clients,
            number,
            node,
            "update rejected" if failure.rejected else "exception",
            failure.cause,
            exhausted,
            failure.non_retryable,
            failure.trace,
        )


@dataclass
class Throughput:
    """How much expected work a tier's actors have done with a method.

    Tasks of milliseconds must not be sent one by one: a task batch has at least the work of `BATCH_SECONDS`. Without
    this, a round of 50 empty tasks on two actors took three times as long.
    """

    work: int = 0
    seconds: float = 0.0

    def record(self, clients: Iterable[Client], seconds: float) -> None:
        """Add tasks that an actor finished, and the seconds that it took."""
        self.work += sum(map(work_of, clients))
        self.seconds += seconds

    def work_in(self, seconds: float) -> float:
        """Return the work that an actor does in this time; 0 while nothing is known."""
        return seconds * self.work / self.seconds if self.seconds else 0.0


def ids_of(group: TaskGroup) -> tuple[ClientId, ...]:
    """Return the ids of a group's clients."""
    return tuple(task.client.id for task in group)


def work_of(client: Client) -> int:
    """Return a client's expected work in examples; a client without examples still costs a message."""
    return 1 + client.num_examples


def _work(group: TaskGroup) -> int:
    return sum(work_of(task.client) for task in group)
