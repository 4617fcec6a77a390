"""What Ray's exceptions mean, on exceptions as Ray makes them; `test_setup_failures.py` has them from real actors."""

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError, UnserializableException

from fedray.runtime.causes import raised_by_code


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
