"""What Ray's exceptions mean: whether an actor's own code raised an exception, or its process was lost, and why."""

import re

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, UnserializableException

NODE_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),.*?\) was ([\d.]+) ?GB used / ([\d.]+) ?GB")
ENDED = re.compile(r"Selected to kill: \(.*?task name=(\w+).*?pid=(\d+).*?actual memory used=([\d.]+) ?GB")
"""What the report of Ray's memory monitor says of the node, and of each process that it has ended."""

CALLED = {
    "DriverActor": "the driver",
    "ClientActor": "a client actor",
    "SiloActor": "a silo",
    "RayTrainWorker": "a worker of a silo",
}
"""What messages call the processes of fedray, by the names of their classes."""

LESS_MEMORY = (
    "use fewer or smaller actors (clients.actors, clients.fuse, train.batch_size), a smaller cohort (clients.per_round)"
    ", or nodes with more memory; `fedray plan` predicts what an actor needs, and `memory` of a tier reserves it"
)
"""What can be changed if memory runs out."""


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


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether Ray's memory monitor has ended the process."""
    return isinstance(error, OutOfMemoryError) or "OUT_OF_MEMORY" in str(error) or bool(ENDED.search(str(error)))


def lost_by(error: BaseException) -> str:
    """Return in one line why a process was lost."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, RayError):  # a call of its own
        return lost_by(error.cause)
    if not ran_out_of_memory(error):
        unclear = " (perhaps the system ended it because memory ran out)" if "OOM killer" in str(error) else ""
        return f"{first_line(error)}{unclear}"
    text = " ".join(str(error).split())
    ended = [f"{CALLED.get(name, name)} (process {pid}) with {used} GB" for name, pid, used in ENDED.findall(text)]
    if not ended or (node := NODE_MEMORY.search(text)) is None:
        return f"{first_line(error)}; {LESS_MEMORY}"
    address, used, limit = node.groups()
    node_had = f"node {address} ({used} of {limit} GB in use)"
    return f"memory ran out on {node_had}, and Ray ended {', '.join(ended)}; {LESS_MEMORY}"


def _last_exception(trace: str) -> str:
    """Return the line of a traceback that names the exception."""
    lines = [line for line in trace.splitlines() if line.strip()]
    below = next((index for index in range(len(lines) - 1, -1, -1) if lines[index].startswith(" ")), -1)
    return lines[min(below + 1, len(lines) - 1)].strip()
