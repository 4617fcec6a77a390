"""How a round's clients are handed to the actors of a tier.

Clients that are trained in one step form a group: `fuse` consecutive ones of a tier, the largest first, so that they
have similar numbers of steps. Who is in a group follows from the cohort alone, and a group is never split: results
depend, by their last bits, on who is trained together.

Groups go to actors in chunks that shrink towards the round's end (guided self-scheduling, Polychronopoulos and Kuck
1987), so that a thousand small clients cost few messages, and nobody waits long for whoever got the last ones. After an
actor died, what it had not finished is handed out group by group, so that a group that kills its actor is known, and
others are not blamed for it.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence

from fedray.errors import ClientFailure, choices
from fedray.types import Client, ClientId
from fedray.worker import Assignment

Group = tuple[Assignment, ...]

SHARE = 2
"""A chunk has 1 / (SHARE · actors) of the work that is left."""


def groups(assignments: Sequence[Assignment], widths: Mapping[str, int]) -> dict[str, list[Group]]:
    """Return each tier's groups, in the order of the assignments.

    widths: how many clients of each tier are trained in one step.
    """
    by_tier: dict[str, list[Assignment]] = {tier: [] for tier in widths}
    for assignment in assignments:
        by_tier[assignment.client.tier].append(assignment)
    return {
        tier: [tuple(entries[start : start + widths[tier]]) for start in range(0, len(entries), widths[tier])]
        for tier, entries in by_tier.items()
    }


class Chunks:
    """The groups of one round on one tier that nobody has finished.

    groups: largest first. max_failures: how often an actor may die with a group alone.
    """

    def __init__(self, groups: Sequence[Group], max_failures: int) -> None:
        self._waiting = deque(groups)
        self._all = self._left = sum(map(_work, groups))
        self._alone: deque[Group] = deque()
        self._max_failures = max_failures
        self._failures: Counter[ClientId] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._alone)

    def take(self, actors: int, least: float = 0) -> list[Group]:
        """Return the next chunk, of at least one group.

        actors: how many share the rest. least: work below which a chunk is not worth its message; nobody gets more
        than an equal part of the round for that.
        """
        if self._alone:
            return [self._alone.popleft()]
        size = max(self._left / (SHARE * actors), min(least, self._all / actors))
        chunk = [self._waiting.popleft()]
        work = _work(chunk[0])
        while self._waiting and work + (following := _work(self._waiting[0])) <= size:
            chunk.append(self._waiting.popleft())
            work += following
        self._left -= work
        return chunk

    def failed(self, chunk: Sequence[Group], finished: int, error: Exception) -> None:
        """Take back what an actor had not finished of its chunk when it died.

        finished: how many of its clients had come back, in their order.

        Raises:
            ClientFailure: a group was alone with its actor more often than `max_failures`.
        """
        unfinished = list(chunk)
        while unfinished and finished > 0:
            finished -= len(unfinished.pop(0))
        self._alone.extend(unfinished)
        if len(chunk) > 1 or not unfinished:
            return
        first = chunk[0][0]
        self._failures[first.client.id] += 1
        deaths = self._failures[first.client.id]
        if deaths > self._max_failures:
            names = choices([assignment.client.id for assignment in chunk[0]])
            raise ClientFailure(
                f"client {names}: its actor died {deaths} times in round {first.server_round} "
                f"(clients.max_failures={self._max_failures}): {error}"
            ) from None


def work_of(client: Client) -> int:
    """Expected work, in examples; a client without any still costs a turn."""
    return 1 + client.num_examples


def _work(group: Group) -> int:
    return sum(work_of(assignment.client) for assignment in group)
