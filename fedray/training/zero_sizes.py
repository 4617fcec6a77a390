"""How much of a model DeepSpeed's stages 2 and 3 hold on the device at a time, by the sizes of the model's blocks.

DeepSpeed's own defaults suit models of many billion parameters: up to 10^9 weights stay on the device or are fetched
ahead, and gradients are collected in buffers of 5 · 10^8 numbers. Smaller models would be there as a whole. With the
sizes of this file stage 3 holds two blocks, the one in use and the one that is fetched ahead of its use, besides at
most one module more than that, the small weights that always stay, and one block's gradients; stage 2 holds one block's
gradients.

A module's own weights are fetched when it is called, whatever the limits are. After that, DeepSpeed fetches weights
ahead, in the order in which the model uses them, until the limit is passed. Weights are released after use unless they
are used again soon.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.training.engines.deepspeed import AUTO

LIVE_BLOCKS = 2
"""Blocks on the device, of which one is in use."""
SMALLEST_BUCKET = 16
"""Numbers in a buffer for gradients, at least."""
PERSISTENCE = 100_000
"""DeepSpeed's default of stage3_param_persistence_threshold."""


def fill_in_sizes(zero: dict[str, Any], adapter: Adapter) -> None:
    """Set what DeepSpeed's section `zero_optimization` leaves out, or leaves to `auto`, by the sizes of the model.

    Gradients are collected in one block's room (`reduce_bucket_size`), or in less if less trains. In stage 3 two blocks
    may be on the device (`stage3_max_live_parameters`), one is fetched ahead (`stage3_prefetch_bucket_size`), and what
    is used again within two blocks stays until then (`stage3_max_reuse_distance`): a block that is computed again for
    its backward pass, and the last one, are fetched once. Weights below DeepSpeed's own threshold, such as norms,
    biases and LoRA's matrices, always stay, but no more of them than one block has
    (`stage3_model_persistence_threshold`).

    With weights on a disk (`nvme`) nothing is fetched ahead or kept: its swapper holds a buffer per weight in use, and
    fails when weights that stay or are fetched ahead have all.

    Args:
        zero: the section, with its stage; changed in place.
        adapter: attached to a model that has all its parameters.
    """
    stage, block = zero.get("stage", 0), largest_block(adapter.model)
    if stage == 0:
        return
    sizes = {"reduce_bucket_size": max(min(adapter.num_trainable(), block), SMALLEST_BUCKET)}
    if stage == 3:
        offload = zero.get("offload_param", {})
        nvme = offload.get("device") == "nvme"
        sizes |= {
            "stage3_max_live_parameters": 0 if nvme else LIVE_BLOCKS * block,
            "stage3_max_reuse_distance": 0 if nvme else LIVE_BLOCKS * block,
            "stage3_prefetch_bucket_size": 0 if nvme else block,
            "stage3_param_persistence_threshold": PERSISTENCE,
            "stage3_model_persistence_threshold": block,
        }
        if nvme:
            _fill_in(offload, {"buffer_size": max(parameter.numel() for parameter in adapter.model.parameters())})
    _fill_in(zero, sizes)


def live_bytes(zero: dict[str, Any], model: nn.Module) -> int:
    """Return the most bytes of weights that stage 3 has on the device at a time.

    Besides what always stays, these are as many parameters as the limits allow, and one module's more: a module is
    fetched as a whole, and the last parameter that is fetched ahead may exceed the limit. A weight that is used again
    within a distance of n parameters, once forward and once backward, is one of the nearest n / 2.

    Args:
        zero: the section `zero_optimization`, filled in.
        model: with all its parameters; may be on the meta device.
    """
    staying = _staying(zero, model)
    passing = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in staying}
    if not passing:
        return sum(staying.values())
    ahead = int(zero["stage3_max_live_parameters"]) if int(zero["stage3_prefetch_bucket_size"]) else 0
    limit = max(ahead, int(zero["stage3_max_reuse_distance"]) // 2)
    module = max(_count(p for p in own.parameters(recurse=False) if id(p) in passing) for own in model.modules())
    width = max(parameter.itemsize for parameter in passing.values())
    whole = sum(parameter.nbytes for parameter in passing.values())
    return sum(staying.values()) + min(whole, width * (limit + module))


def largest_block(model: nn.Module) -> int:
    """Return the number of parameters of the largest member of the model's lists of modules, with what is inserted in
    it; of the whole model if it has no such list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList)]
    return max((_count(block.parameters()) for block in blocks), default=_count(model.parameters()))


def _staying(zero: dict[str, Any], model: nn.Module) -> dict[int, int]:
    """Return the bytes of each parameter that is never released, by its identity: the model's small ones in their
    order, up to a sum (DeepSpeed's `mark_persistent_parameters`)."""
    each, together = (int(zero[f"stage3_{which}_persistence_threshold"]) for which in ("param", "model"))
    found: dict[int, int] = {}
    total = 0
    for parameter in model.parameters():
        if parameter.numel() <= each and parameter.numel() + total <= together:
            found[id(parameter)] = parameter.nbytes
            total += parameter.numel()
    return found


def _fill_in(section: dict[str, Any], values: dict[str, int]) -> None:
    section.update({name: value for name, value in values.items() if section.get(name, AUTO) == AUTO})


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
