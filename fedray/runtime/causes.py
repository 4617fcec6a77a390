"""What Ray's exceptions mean: whether an actor's own code raised an exception, or its process was lost."""

from ray.exceptions import RayActorError, RayError, RayTaskError, UnserializableException


def first_line(error: BaseException) -> str:
    """Return the line of Ray's long messages that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def raised_by_code(error: BaseException) -> str | None:
    """Return the exception that the code of an actor or a task raised, and would raise again, and where it was raised.

    Returns:
        The exception and its traceback; None if a process, a node or an object was lost instead.
    """
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"{_last_exception(str(error))}\n{error}"
    if isinstance(error, UnserializableException):  # raised by code, but this process cannot build it
        return str(error)
    if isinstance(error, RayTaskError):
        cause = error.cause
        if type(cause) is RayError:  # Ray's stand-in for an exception that cannot be pickled
            return str(cause)
        if isinstance(cause, RayError):  # of a call of its own
            return raised_by_code(cause)
        return f"{type(cause).__name__}: {first_line(cause)}\n{error}"
    return None


def _last_exception(trace: str) -> str:
    """Return the line of a traceback that names the exception."""
    lines = [line for line in trace.splitlines() if line.strip()]
    below = next((index for index in range(len(lines) - 1, -1, -1) if lines[index].startswith(" ")), -1)
    return lines[min(below + 1, len(lines) - 1)].strip()
