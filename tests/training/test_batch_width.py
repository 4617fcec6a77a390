"""How many clients are best trained in one step, by a clock of the tests' own."""

import pytest
import torch

from fedray.training.batch_width import fastest_width, largest_width, width_seconds


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        (lambda width: 1, 8),  # a group costs the same, however many are in it
        (lambda width: width, 1),  # nothing is gained
        (lambda width: 0.97 * width if width == 4 else width, 1),  # not clearly faster
        (lambda width: width if width != 4 else 2, 4),
    ],
)
def test_the_fastest_width(cost, best):
    """By a clock that only `serve` moves: 12 clients, groups of 8 leave one of 4."""
    now, served = [0.0], []

    def serve(start, stop):
        served.append((start, stop))
        now[0] += cost(stop - start)

    assert fastest_width(width_seconds(serve, 12, (2, 4, 8, 16), clock=lambda: now[0]), 12, 1) == best
    assert served[:4] == [(0, 1), (0, 2), (0, 4), (0, 8)]
    assert served.count((8, 12)) == 2 * 2  # widths 4 and 8, timed twice each


def test_a_width_beyond_the_memory_ends_the_search():
    now = [0.0]

    def serve(start, stop):
        if stop - start > 2:
            raise torch.OutOfMemoryError
        now[0] += 1

    assert width_seconds(serve, 12, (2, 4, 8), clock=lambda: now[0]) == {1: 12, 2: 6}


@pytest.mark.parametrize(
    ("cohort", "actors", "of_eight", "best"),
    [
        (20, 1, 0.8, 8),  # one actor trains them all
        (20, 2, 0.8, 5),  # 8 + 4 clients of 0.8 are 9.6; 5 + 5 of 0.9 are 9; alone 10
        (20, 2, 0.7, 8),  # 8.4
        (16, 2, 0.8, 8),  # an equal part for each
        (20, 20, 0.8, 1),  # one for each: nobody to train with
        (3, 2, 0.8, 1),  # 2 + 1 alone are 2, three in one step 2.4
    ],
)
def test_the_busiest_actor_decides(cohort, actors, of_eight, best):
    """Seconds per client by width, the same for any number of them."""
    assert fastest_width({1: 1.0, 5: 0.9, 8: of_eight}, cohort, actors) == best


@pytest.mark.parametrize(
    ("number", "room", "width"),
    [
        (10, 189, 5),  # eight fit: two steps of five
        (10, 200, 10),
        (10, 119, 1),
        (7, 140, 4),  # four and three
        (1000, 10**6, 63),  # no more than 64, in 16 steps
        (1, 10**6, 1),
    ],
)
def test_the_largest_width_that_fits(number, room, width):
    """100 bytes, and 10 for each client."""
    asked = []

    def held(clients):
        asked.append(clients)
        return 100 + 10 * clients

    assert largest_width(held, room, number) == width
    assert len(asked) <= (3 if number > 1 else 0)
    assert all(clients <= min(number, 64) for clients in asked)


def test_a_width_that_takes_more_than_expected_is_halved():
    """From four clients on, an evaluation takes more than training: 40 for each. By extrapolation nine would fit into
    200 bytes, but they take 360, and four take 160."""
    assert largest_width(lambda clients: max(100 + 10 * clients, 40 * clients), 199, 9) == 3
