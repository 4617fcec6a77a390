"""Several pieces of sequential code, each of which asks for work now and then, so that what they ask for can be done
together.

Each piece runs on a thread of its own, strictly alone: exactly one thread runs at any moment, in an order that follows
from the pieces' indices alone. When all that still run wait for an answer, those who asked for the same kind of work
are served together.
"""

from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Ask = Callable[[Any], Any]
"""Given a request, wait for its answer."""


class _Abandoned(BaseException):
    """Unwinds a piece that nobody waits for any more."""


def run_in_lockstep(
    pieces: Sequence[Callable[[Ask], Result]],
    serve: Callable[[Mapping[int, Any]], Mapping[int, Any]],
    kinds: Sequence[type],
) -> list[Result]:
    """Return what the pieces return.

    Args:
        serve: given the requests of some pieces, all of one kind, by the pieces' indices, returns their answers.
        kinds: types of requests. Earlier kinds are served first: those who wait for a later one are joined by others.

    Raises:
        Whatever a piece or `serve` raises; the other pieces are then abandoned where they wait.
    """
    turns = [_Turn(piece) for piece in pieces]
    waiting: dict[int, Any] = {}
    try:
        answers: Mapping[int, Any] = dict.fromkeys(range(len(turns)))
        while answers:
            for index in sorted(answers):
                waiting.pop(index, None)
                if not turns[index].resume(answers[index]):
                    waiting[index] = turns[index].request
            kind = next((kind for kind in kinds if any(isinstance(asked, kind) for asked in waiting.values())), None)
            if kind is None and waiting:
                raise TypeError(f"requests of unknown kinds: {waiting}")
            chosen = {index: waiting[index] for index in sorted(waiting) if isinstance(waiting[index], kind or object)}
            answers = serve(chosen) if chosen else {}
    finally:
        for turn in turns:
            turn.abandon()
    return [turn.result for turn in turns]


class _Turn(Generic[Result]):
    """One piece on its thread."""

    def __init__(self, piece: Callable[[Ask], Result]) -> None:
        self._piece = piece
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._pauses: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._abandoned = False
        self.request: Any = None
        self.result: Result

    def resume(self, answer: Any) -> bool:
        """Let the piece run until it asks for something or ends; return whether it ended. Raises what it raised."""
        if self._thread is None:
            self._thread = Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._answers.put(answer)
        self._pauses.get()
        if self._error is not None:
            raise self._error
        return hasattr(self, "result")

    def abandon(self) -> None:
        """Unwind the piece, if it waits, and wait for its thread to end."""
        if self._thread is not None:
            self._abandoned = True
            self._answers.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            self.result = self._piece(self._ask)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._pauses.put(None)

    def _ask(self, request: Any) -> Any:
        if not self._abandoned:
            self.request = request
            self._pauses.put(None)
            answer = self._answers.get()
        if self._abandoned:  # also a piece that cleans up while it is unwound
            raise _Abandoned
        return answer
