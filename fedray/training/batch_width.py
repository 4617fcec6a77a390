"""The best number of clients to train in one step, the width of a client batch, for `clients.fuse: auto`: the fastest
on a CPU, the largest that fits on a GPU."""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch

WIDTHS = (1, 2, 4, 8, 16)
"""Widths that are tried."""
EQUAL_PARTS = (1, 2, 3)
"""Also tried are the widths that cut an actor's clients into so many equal batches: ten clients are worth trying in one
batch of ten, two of five and three of four, not only of eight and two."""
TIMED_STEPS = 3
"""Optimizer steps of a client while widths are timed."""
TIMED_REPEATS = 2
"""Every width is timed this often, and its fastest time counts."""
WIDEST = 64
"""The largest width on a GPU. A step of 64 clients is large enough to keep the GPU busy; more would only add threads,
one per client, and work to be repeated after a failure."""
CLEARLY = 0.95
"""Share of the time of width 1 below which a larger width is worth its memory."""


def widths_to_time(number: int) -> list[int]:
    """Return the widths that are worth timing with a number of clients, ascending."""
    return sorted({*WIDTHS, *(math.ceil(number / parts) for parts in EQUAL_PARTS)})


def width_seconds(
    train: Callable[[int, int], object],
    number: int,
    widths: Sequence[int] = WIDTHS,
    clock: Callable[[], float] = perf_counter,
) -> dict[int, float]:
    """Time how long it takes to train all clients, by the number of clients in one step.

    Every width trains all clients, so that all widths do the same work. A width that does not fit into the device's
    memory ends the search, as larger ones would not fit either.

    Args:
        train: trains the clients from one index up to another in one step.
        number: number of clients.
        widths: those to try, besides 1.
        clock: returns seconds.

    Returns:
        Seconds by width; 1 is always among them.
    """
    possible = [width for width in sorted({1, *widths}) if width <= number]
    for place, width in enumerate(possible):
        try:
            train(0, width)  # the first time allocates
        except torch.OutOfMemoryError:
            if width == 1:
                raise
            possible = possible[:place]
            break
    seconds = dict.fromkeys(possible, math.inf)
    for _ in range(TIMED_REPEATS):
        for width in possible:
            started = clock()
            for start in range(0, number, width):
                train(start, min(start + width, number))
            seconds[width] = min(seconds[width], clock() - started)
    return seconds


def fastest_width(seconds: Mapping[int, float], cohort: int, actors: int) -> int:
    """Return the width that is best for a tier: 1, unless another one is clearly faster.

    A round lasts until its busiest actor has finished, and batches are not split: of 20 clients in batches of 8, one of
    two actors has 12. Clients are taken to be equal.

    Args:
        seconds: in which an actor trains the same clients, by width (`width_seconds`).
        cohort: clients of the tier in a round.
        actors: number of actors of the tier.
    """
    rounds = {width: taken * _busiest(cohort, actors, width) for width, taken in seconds.items()}
    best = min(rounds, key=lambda width: rounds[width])
    return best if rounds[best] < CLEARLY * rounds[1] else 1


def largest_width(held: Callable[[int], int], room: int, number: int) -> int:
    """Return the largest number of clients per step that fits, so that all steps have about equally many.

    Bytes grow by about the same for every client, so the largest width is extrapolated from those of one and two
    clients, and halved while it does not fit. Of ten clients, if eight fit, five are trained in each of two steps.

    Args:
        held: bytes that a number of clients takes; it may take seconds.
        room: bytes that there are.
        number: of an actor's clients in a round; no width is larger, nor than `WIDEST`.
    """
    most = min(number, WIDEST)
    if most < 2 or (two := held(2)) > room:
        return 1
    one = held(1)
    width = min(most, 1 + (room - one) // max(two - one, 1))
    while width > 2 and held(width) > room:
        width = max(width // 2, 2)
    return math.ceil(number / math.ceil(number / width))


def _busiest(cohort: int, actors: int, width: int) -> int:
    """Return how many clients the busiest actor has, if each batch goes to the actor with the fewest clients."""
    loads = [0] * actors
    for start in range(0, cohort, width):
        heapq.heapreplace(loads, loads[0] + min(width, cohort - start))
    return max(loads)
