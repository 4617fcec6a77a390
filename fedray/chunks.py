"""How a round's clients are handed to the actors of a tier: in chunks that shrink towards the end, the largest clients
first (guided self-scheduling, Polychronopoulos and Kuck 1987), so that a thousand small clients cost few messages, and
nobody waits long for whoever got the last ones.

After an actor died, what it had not finished is handed out client by client, so that a client that kills its actor is
known, and others are not blamed for it.
"""

from collections import Counter, deque
from collections.abc import Sequence

from fedray.errors import ClientFailure
from fedray.types import ClientId
from fedray.worker import Assignment

SHARE = 2
"""A chunk has 1 / (SHARE · actors) of the work that is left."""


class Chunks:
    """The assignments of one round on one tier that nobody has finished.

    assignments: largest first. max_failures: how often an actor may die with a client alone.
    """

    def __init__(self, assignments: Sequence[Assignment], max_failures: int) -> None:
        self._waiting = deque(assignments)
        self._alone: deque[Assignment] = deque()
        self._max_failures = max_failures
        self._failures: Counter[ClientId] = Counter()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._alone)

    def take(self, actors: int) -> list[Assignment]:
        """Return the next chunk, of at least one; actors: how many share the rest."""
        if self._alone:
            return [self._alone.popleft()]
        left = sum(_work(assignment) for assignment in self._waiting) / (SHARE * actors)
        chunk = [self._waiting.popleft()]
        work = _work(chunk[0])
        while self._waiting and work + _work(self._waiting[0]) <= left:
            chunk.append(self._waiting.popleft())
            work += _work(chunk[-1])
        return chunk

    def failed(self, chunk: Sequence[Assignment], unfinished: Sequence[Assignment], error: Exception) -> None:
        """Take back what an actor had not finished of its chunk when it died.

        Raises:
            ClientFailure: a client was alone with its actor more often than `max_failures`.
        """
        self._alone.extend(unfinished)
        if len(chunk) > 1 or not unfinished:
            return
        client = chunk[0].client.id
        self._failures[client] += 1
        if self._failures[client] > self._max_failures:
            raise ClientFailure(
                f"client {client!r}: its actor died {self._failures[client]} times in round {chunk[0].server_round} "
                f"(clients.max_failures={self._max_failures}): {error}"
            ) from None


def _work(assignment: Assignment) -> int:
    """Expected work, in examples; a client without any still costs a turn."""
    return 1 + assignment.client.num_examples
