"""How a round's clients are handed to the actors of a tier.

Clients that are trained in one step form a group: `fuse` consecutive ones of a tier, the largest first, so that they
have similar numbers of steps. Who is in a group follows from the cohort alone, and a group is never split: results
depend, by their last bits, on who is trained together.

Groups go to actors in chunks that shrink towards the round's end (guided self-scheduling, Polychronopoulos and Kuck
1987), so that a thousand small clients cost few messages, and nobody waits long for whoever got the last ones. After an
actor died, what it had not finished is handed out group by group, so that a group that kills its actor is known, and
others are not blamed for it. A group that has failed too often is given up; of several clients, each has one more try
alone first.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from fedray.federation.failures import FailedAttempt, TaskFailure
from fedray.federation.worker import ClientTask
from fedray.types import Client, ClientId

TaskGroup = tuple[ClientTask, ...]

SHARE = 2
"""A chunk has 1 / (SHARE · actors) of the work that is left."""


def task_groups(assignments: Sequence[ClientTask], widths: Mapping[str, int]) -> dict[str, list[TaskGroup]]:
    """Return each tier's task_groups, in the order of the assignments.

    widths: how many clients of each tier are trained in one step.
    """
    by_tier: dict[str, list[ClientTask]] = {tier: [] for tier in widths}
    for assignment in assignments:
        by_tier[assignment.client.tier].append(assignment)
    return {
        tier: [tuple(entries[start : start + widths[tier]]) for start in range(0, len(entries), widths[tier])]
        for tier, entries in by_tier.items()
    }


class WorkQueue:
    """The task_groups of one round on one tier that nobody has finished.

    task_groups: largest first. max_failures: how often a group is run again after it failed.
    """

    def __init__(self, task_groups: Sequence[TaskGroup], max_failures: int) -> None:
        self._waiting = deque(task_groups)
        self._all = self._left = sum(map(_work, task_groups))
        self._alone: deque[tuple[TaskGroup, Any]] = deque()
        self._max_failures = max_failures
        self._failures: Counter[tuple[ClientId, ...]] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._alone)

    def take(self, actors: int, least: float = 0, actor: Any = None) -> list[TaskGroup]:
        """Return the next chunk; empty where all that is left has failed with this actor and there are others.

        actors: how many share the rest. least: work below which a chunk is not worth its message; nobody gets more
        than an equal part of the round for that. actor: who asks.
        """
        for entry in self._alone:
            if entry[1] is None or entry[1] is not actor or actors == 1:
                self._alone.remove(entry)
                return [entry[0]]
        if not self._waiting:
            return []
        size = max(self._left / (SHARE * actors), min(least, self._all / actors))
        chunk = [self._waiting.popleft()]
        work = _work(chunk[0])
        while self._waiting and work + (following := _work(self._waiting[0])) <= size:
            chunk.append(self._waiting.popleft())
            work += following
        self._left -= work
        return chunk

    def unserved(self, task_groups: Sequence[TaskGroup]) -> None:
        """Take back task_groups that their actor left without its being known that it was because of them."""
        self._alone.extend((group, None) for group in task_groups)

    def failed(self, group: TaskGroup, actor: Any = None, non_retryable: bool = False) -> tuple[int, bool]:
        """Take back a group that failed with an actor.

        non_retryable: it would fail again.

        Returns: how often it has failed, and whether it is given up.
        """
        ids = ids_of(group)
        self._failures[ids] += 1
        number = self._failures[ids]
        if number <= self._max_failures and not non_retryable:
            self._alone.append((group, actor))
            return number, False
        if len(group) == 1:
            return number, True
        for assignment in group:
            self._failures[(assignment.client.id,)] = max(number, self._max_failures)
            self._alone.append(((assignment,), None))
        return number, False

    def take_back(
        self, failure: TaskFailure, chunk: Sequence[TaskGroup], actor: Any = None, node: str = ""
    ) -> FailedAttempt:
        """Take back the group of a chunk whose clients failed in an actor that goes on; return what is told of it.

        A client whose update was rejected is given up at once, and not its group.
        """
        group = next(group for group in chunk if failure.clients[0] in ids_of(group))
        number, exhausted = (1, True) if failure.rejected else self.failed(group, actor, failure.non_retryable)
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


def ids_of(group: TaskGroup) -> tuple[ClientId, ...]:
    return tuple(assignment.client.id for assignment in group)


def work_of(client: Client) -> int:
    """Expected work, in examples; a client without any still costs a turn."""
    return 1 + client.num_examples


def _work(group: TaskGroup) -> int:
    return sum(work_of(assignment.client) for assignment in group)
