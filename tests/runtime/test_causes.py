"""What Ray's exceptions mean, on exceptions as Ray makes them; `test_setup_failures.py` has them from real actors."""

import pytest
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    UnserializableException,
)

from fedray.runtime.causes import lost_by, raised_by_code, ran_out_of_memory


def task_error(cause: Exception) -> RayTaskError:
    trace = f"ray::A.setup() (pid=7)\n  File a.py, line 3, in setup\n{type(cause).__name__}: {cause}"
    return RayTaskError("setup", trace, cause, proctitle="ray::A.setup()", pid=7, ip="10.0.0.7")


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (task_error(ValueError("no such layer\nand more")), "ValueError: no such layer"),
        (task_error(task_error(KeyError("w"))), "KeyError: 'w'"),  # the call of an actor failed within another call
        (ActorDiedError(task_error(ImportError("no module named mine"))), "ImportError: no module named mine"),
        (
            task_error(RayError("Exception own.Odd isn't serializable: ...")),
            "Exception own.Odd isn't serializable: ...",
        ),
        (UnserializableException("own.Odd: 3"), "own.Odd: 3"),
    ],
)
def test_what_code_raises_is_told_and_counts_as_raised(error: RayError, first: str) -> None:
    raised = raised_by_code(error)
    assert raised is not None
    assert first in raised.splitlines()[0] or first in raised.splitlines()[-1]


def test_the_trace_of_an_exception_is_told_too() -> None:
    assert "File a.py, line 3" in str(raised_by_code(task_error(ValueError("no such layer"))))


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), task_error(ActorDiedError()), task_error(ObjectLostError("00ff", "10.0.0.7", "f"))],
)
def test_what_is_lost_is_not_raised(error: RayError) -> None:
    assert raised_by_code(error) is None


REPORT = """2 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 10.0.0.7, ID: 7d) was \
8.61GB used / 23.54GB limit (0.365616)
OOM kill reason: Memory usage 9215004672B exceeded threshold of 252765136B (1.0% of 25276514304B limit)
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(e6be01): job ID=01000000, lease ID=02, task name=DriverActor.__init__, required \
resources={memory: 1}, pid=22443, actual memory used=5.05GB, worker ID=bcf3)
Selected to kill: (Actor(e6be02): job ID=01000000, lease ID=03, task name=ClientActor.__init__, required \
resources={CPU: 1}, pid=22444, actual memory used=0.72GB, worker ID=bcf4)
]
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io"""
"""What Ray 2.60 reports, without what it says about the object store."""


@pytest.mark.parametrize("error", [OutOfMemoryError(REPORT), task_error(OutOfMemoryError(REPORT))])
def test_what_the_memory_monitor_ended_is_told_with_its_memory_and_what_to_change(error: RayError) -> None:
    assert ran_out_of_memory(error)
    assert raised_by_code(error) is None
    told, _, change = lost_by(error).partition("; ")
    assert told == (
        "memory ran out on node 10.0.0.7 (8.61 of 23.54 GB in use), and Ray ended the driver (process 22443) with 5.05 "
        "GB, a client actor (process 22444) with 0.72 GB"
    )
    assert change.startswith("use fewer or smaller actors (clients.actors")


def test_another_report_is_told_by_its_first_line() -> None:
    assert lost_by(OutOfMemoryError("Task was killed.\nMore.")).startswith(
        "Task was killed.; use fewer or smaller actors"
    )


def test_a_process_that_was_killed_may_have_run_out_of_memory() -> None:
    trace = "The actor died.\nCommon causes: (1) the process was killed by the OOM killer, (2) it crashed"
    assert lost_by(RayError(trace)) == "The actor died. (perhaps the system ended it because memory ran out)"
    assert lost_by(RayError("The node is gone.")) == "The node is gone."
    assert lost_by(task_error(task_error(RayError("The node is gone.")))) == "The node is gone."
