"""Mixed precision: parameters that train are float32, and the model computes with them in its own, shorter type."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.heads import head_modules

COMPUTES_IN = "fedray_computes_in"
"""Attribute of a model, read by `computes_in`."""


def mixed_precision(adapter: Adapter) -> Adapter:
    """Let an adapter whose model is bfloat16 train the base model's own parameters without losing small updates.

    Those parameters, and with them their gradients and the optimizer's moments, become float32 (the masters). A forward
    pass runs under torch.autocast, which computes matrix products in bfloat16, and normalisation, losses and the task
    head in float32. An adapter that inserts all that it trains, and one on a float32 model, stay as they are.

    Source: Micikevicius et al., Mixed Precision Training, arXiv:1710.03740, section 3.1; in bfloat16, losses need no
    scaling (section 3.2).

    Args:
        adapter: newly attached; changed in place, with its model.

    Returns:
        The same adapter.
    """
    group = adapter.base_group()
    shorter = {entry.parameter.dtype for entry in adapter.entries(group)} - {torch.float32} if group else set()
    if group is None or not shorter:
        return adapter
    (dtype,) = shorter
    for entry in adapter.entries(group):
        entry.parameter.data = entry.parameter.data.float()
    _compute_in(dtype, adapter.model)
    setattr(adapter.model, COMPUTES_IN, dtype)
    for module in head_modules(adapter.model).values():
        _compute_in(None, module)
    return adapter


def computes_in(model: nn.Module) -> torch.dtype | None:
    """Return the type in which a model in mixed precision computes; None: the type of its weights."""
    return getattr(model, COMPUTES_IN, None)


def _compute_in(dtype: torch.dtype | None, module: nn.Module) -> None:
    """Run the module's forward passes under torch.autocast; None: without.

    Every use of a parameter converts it anew, for ZeRO-3 gives its memory back in between.
    """
    forward = module.forward

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            return forward(*args, **kwargs)

    module.forward = cast
