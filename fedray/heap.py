"""Python's garbage collector, kept away from what never becomes garbage."""

import gc


def settle_heap() -> None:
    """Collect what is garbage, and leave everything else out of all later collections.

    What torch and its kin import are a million objects that live as long as the process, and a collection that a
    thousand clients' messages set off would go through all of them.
    """
    gc.unfreeze()  # of an earlier call, some may be garbage by now
    gc.collect()
    gc.freeze()
