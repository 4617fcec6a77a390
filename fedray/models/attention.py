"""Attention of a bfloat16 model on a CPU: short sequences are trained in float32.

On a CPU, a training step through torch's attention takes 1.3 to 3 times as long in bfloat16 as in float32, conversions
included, up to the length at which torch divides sequences into larger blocks. Without training, bfloat16 is faster at
any length (`jobs/benchmarks/attention.py`, on a CPU that multiplies in bfloat16; others were not measured).
"""

import inspect
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LONG = 192
"""Tokens from which torch's blocks are larger, and bfloat16 is left as it is."""
NAME = "sdpa_short_in_float32"


def train_short_in_float32(model: PreTrainedModel) -> None:
    """Compute torch's own attention of a bfloat16 model on a CPU in float32 where that is faster.

    Other models stay as they are, and so do models whose code compares the attention's name with `sdpa`: with another
    name, sparse attention would become dense. transformers has no interface that tells; it reads sources as well.
    """
    plain = model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    if not plain or any(_names_attention(module) for module in {type(part).__module__ for part in model.modules()}):
        return
    if all(part._can_set_attn_implementation() for part in model.modules() if isinstance(part, PreTrainedModel)):
        model.set_attn_implementation(NAME)


@cache
def _names_attention(module: str) -> bool:
    """Return whether the source of a Python module, other than torch's, contains the name of torch's attention, or
    cannot be read."""
    if module.split(".")[0] == "torch":
        return False
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return True
    return '"sdpa"' in source or "'sdpa'" in source


def short_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers' function for `sdpa` does.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, d].
        key: as query, possibly of fewer heads.
        value: as key.
        attention_mask: boolean, or added to the scores.

    Returns:
        The output, [batch, tokens, heads, d] of query's type, and None for the weights.
    """
    dtype, tokens = query.dtype, query.shape[2]
    trained = any(part.requires_grad for part in (query, key, value))
    plain = options.get("position_bias") is None
    if dtype == torch.bfloat16 and trained and plain and tokens < LONG:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output.to(dtype), None


AttentionInterface.register(NAME, short_in_float32)
AttentionMaskInterface.register(NAME, sdpa_mask)
