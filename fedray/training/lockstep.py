"""Runs several pieces of sequential code, the routines, so that the work they request is computed together.

Each routine runs on a thread of its own, but exactly one thread runs at any moment, in an order that follows from the
routines' indices alone. When all routines that still run wait for an answer, requests for the same kind of work
are computed together.
"""

from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Ask = Callable[[Any], Any]
"""Given a request, waits for its answer and returns it."""


class _Abandoned(BaseException):
    """Unwinds a routine whose result is not needed any more."""


def run_in_lockstep(
    routines: Sequence[Callable[[Ask], Result]],
    serve: Callable[[Mapping[int, Any]], Mapping[int, Any]],
    kinds: Sequence[type],
) -> list[Result]:
    """Run the routines to their ends.

    Args:
        routines: each asks for work by calling its argument with a request.
        serve: given the requests of some routines, all of one kind, by the routines' indices, returns their answers.
        kinds: types of requests. Earlier kinds are served first, so that other routines can join those that wait for a
            later kind.

    Returns:
        What the routines return, in their order.

    Raises:
        Exception: whatever a routine or `serve` raises; the other routines are then unwound where they wait.
    """
    running = [_Routine(routine) for routine in routines]
    waiting: dict[int, Any] = {}
    try:
        answers: Mapping[int, Any] = dict.fromkeys(range(len(running)))
        while answers:
            for index in sorted(answers):
                waiting.pop(index, None)
                if not running[index].resume(answers[index]):
                    waiting[index] = running[index].request
            kind = next((kind for kind in kinds if any(isinstance(one, kind) for one in waiting.values())), None)
            if kind is None and waiting:
                raise TypeError(f"requests of unknown kinds: {waiting}")
            chosen = {index: waiting[index] for index in sorted(waiting) if isinstance(waiting[index], kind or object)}
            answers = serve(chosen) if chosen else {}
    finally:
        for routine in running:
            routine.abandon()
    return [routine.result for routine in running]


class _Routine(Generic[Result]):
    """One routine on its thread."""

    def __init__(self, routine: Callable[[Ask], Result]) -> None:
        self._routine = routine
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._pauses: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._abandoned = False
        self.request: Any = None
        self.result: Result

    def resume(self, answer: Any) -> bool:
        """Let the routine run until it asks for something or ends; return whether it ended. Raises what it raised."""
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
        """Unwind the routine, if it waits, and wait for its thread to end."""
        if self._thread is not None:
            self._abandoned = True
            self._answers.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            self.result = self._routine(self._ask)
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
        if self._abandoned:  # also a routine that cleans up while it is unwound
            raise _Abandoned
        return answer
