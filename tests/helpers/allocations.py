"""What torch allocates, by its own profiler."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def most_allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at one time while a function ran, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        largest = max(largest, now)
    return largest
