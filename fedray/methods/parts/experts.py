"""LoRA experts in an adapter of the mixer `experts`: one's own in the first branch, others in the second one."""

from collections.abc import Sequence

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import concatenate
from fedray.methods.parts.factors import join, split
from fedray.types import Vector


def load(adapter: Adapter, own: Vector, others: Sequence[Vector], router: Vector) -> None:
    """Load the experts, in the places that the second branch has for them, and the router.

    Args:
        own: one's own expert, [layout("lora").size].
        others: at most as many as there are places.
        router: G, [layout("mixer.G").size].
    """
    layout, present = adapter.layout("lora"), adapter.layout("mixer.present")
    room = present.slots[0].size
    filled = [*others, *[np.zeros_like(own)] * (room - len(others))]
    targets = zip(*(split(layout, expert) for expert in filled), strict=True)
    adapter.load("lora", own)
    adapter.load("rest", join([concatenate([(1.0, x) for x in target]) for target in targets]))
    adapter.load("mixer.present", np.tile(np.arange(room) < len(others), len(present.slots)).astype(np.float32))
    adapter.load("mixer.G", router)
