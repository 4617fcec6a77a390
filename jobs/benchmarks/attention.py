"""Time attention on one CPU thread: in float32, in bfloat16, and as fedray trains a bfloat16 model.

    python jobs/benchmarks/attention.py

Times forward and backward together, and forward alone, by sequence length, with 2,048 tokens per batch and 8 heads of
64. The three variants are interleaved, and the program prints medians in milliseconds. In training, the third variant
converts to float32 and back at every length, which shows the length from which converting does not pay:
`fedray.models.attention.LONG`. Takes one minute.
"""

import os
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedray.models import attention

HEADS, WIDTH, BATCH_TOKENS = 8, 64, 2048
LENGTHS = (16, 32, 64, 96, 128, 160, 192, 256, 512)
REPEATS = 15


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def as_trained(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention.short_in_float32(nn.Module(), query, key, value, None)[0]


def milliseconds(select_participants: Callable[..., Tensor], parts: list[Tensor], trained: bool) -> float:
    inputs = [part.requires_grad_(trained) for part in parts]
    started = perf_counter()
    output = select_participants(*inputs)
    if trained:
        torch.autograd.grad(output, inputs, torch.ones_like(output))
    return 1e3 * (perf_counter() - started)


def main() -> None:
    torch.set_num_threads(1)
    attention.LONG = max(LENGTHS) + 1  # so that every length is converted
    for tokens in LENGTHS:
        narrow = list(torch.randn(3, BATCH_TOKENS // tokens, HEADS, tokens, WIDTH).bfloat16())
        wide = [part.float() for part in narrow]
        contenders = {"float32": (plain, wide), "bfloat16": (plain, narrow), "as trained": (as_trained, narrow)}
        for trained in (True, False):
            timed = [{name: milliseconds(*it, trained) for name, it in contenders.items()} for _ in range(REPEATS)]
            shown = ", ".join(f"{name} {median(times[name] for times in timed):.1f}" for name in contenders)
            print(f"{tokens} tokens, {'trained' if trained else 'forward only'}: {shown} ms", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
