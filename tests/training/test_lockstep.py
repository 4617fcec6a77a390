"""Sequential pieces that are served together."""

import threading
from dataclasses import dataclass

import pytest

from fedray.training.lockstep import run_in_lockstep


@dataclass(frozen=True)
class Small:
    value: int


@dataclass(frozen=True)
class Large:
    value: int


def running():
    return [thread for thread in threading.enumerate() if "Thread-" in thread.name and "_run" in thread.name]


def test_requests_of_one_kind_are_served_together_small_ones_first():
    """Piece 1 asks for one more small thing, so that both meet at the large one."""
    served = []

    def piece(small):
        def run(ask):
            return [*(ask(Small(value)) for value in small), ask(Large(len(small)))]

        return run

    def serve(requests):
        served.append(dict(requests))
        return {index: request.value * 10 for index, request in requests.items()}

    results = run_in_lockstep([piece([1]), piece([2, 3]), piece([])], serve, (Small, Large))
    assert results == [[10, 10], [20, 30, 20], [0]]
    assert served == [
        {0: Small(1), 1: Small(2)},
        {1: Small(3)},
        {0: Large(1), 1: Large(2), 2: Large(0)},
    ]


def test_pieces_that_ask_for_nothing():
    assert run_in_lockstep([lambda ask: 1, lambda ask: 2], lambda requests: {}, (Small,)) == [1, 2]


def test_one_thread_runs_at_a_time_in_order():
    trace = []

    def piece(name):
        def run(ask):
            for step in range(3):
                trace.append((name, step))
                ask(Small(step))
            return name

        return run

    run_in_lockstep([piece("a"), piece("b")], dict, (Small,))
    assert trace == [(name, step) for step in range(3) for name in "ab"]


def test_an_error_of_a_piece_surfaces_and_no_thread_is_left():
    unwound = []

    def waits(ask):
        try:
            ask(Small(0))
            ask(Small(1))
        finally:
            unwound.append(True)
            ask(Small(2))

    def fails(ask):
        ask(Small(0))
        assert len(running()) == 3
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_in_lockstep([waits, fails, waits], dict, (Small,))
    assert unwound == [True, True]
    assert not running()


def test_an_error_while_serving_surfaces_and_no_thread_is_left():
    def serve(requests):
        raise ValueError("served badly")

    with pytest.raises(ValueError, match="served badly"):
        run_in_lockstep([lambda ask: ask(Small(0))] * 3, serve, (Small,))
    assert not running()


def test_a_request_of_no_known_kind_is_an_error():
    with pytest.raises(TypeError, match="Large"):
        run_in_lockstep([lambda ask: ask(Large(0))], dict, (Small,))
    assert not running()
