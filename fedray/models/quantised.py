"""Linear layers of a frozen base model in 4 or 8 bits, in the formats of bitsandbytes and with its functions.

- `nf4` (QLoRA, arXiv 2305.14314): 4 bits per weight in blocks of 64; a block's largest absolute value is itself kept in
  8 bits, in blocks of 256 (double quantisation, the default of bitsandbytes' own layer).
- `int8`: the weights of LLM.int8() (arXiv 2208.07339), rounded to 8 bits by output row.

A pass dequantises a layer's weight to the type of its input and multiplies with that; backward passes dequantise it
again, so that no more than one layer's weight exists at a time. Activations are never quantised: LLM.int8() treats a
column of activations by its largest value in the whole batch, so that a client's result would depend on the others in
its step, and its `threshold` does not apply here. bitsandbytes' own layers are not used, because they keep parts of a
weight outside parameters and buffers, where neither the node's file nor the prediction of memory finds them, and
because on some CPUs evaluation packs the weights of its 4-bit layer anew: a copy in every process, which later has no
gradient. Here all parts are buffers.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedray.config import Quantised
from fedray.errors import ConfigError
from fedray.models.load_options import LoadOptions

BLOCK = 64
"""Weights that share a scale in nf4."""
NESTED_BLOCK = 256
"""Scales that share a scale; bitsandbytes supports no other number."""
LARGEST_CODE = 127
"""The code of a row's largest absolute value in int8."""


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is quantised; its bias, if it has one, is not.

    Args:
        layer: torch's linear layer, or transformers' Conv1D, which stores its weight transposed; also on the meta
            device.

    Attributes:
        transposed: whether it stands for a Conv1D.
        dtype: the type of the weight before.
    """

    def __init__(self, layer: nn.Linear | Conv1D):
        nn.Module.__init__(self)  # that of torch's linear layer would make a weight
        weight = layer.weight.detach()
        self.transposed = isinstance(layer, Conv1D)
        weight = weight.T if self.transposed else weight
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
        for name, part in self.quantise(weight.contiguous()).items():
            self.register_buffer(name, part)
        self.train(layer.training)

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts of a quantised weight, [d_out, d_in], by name; also on the meta device, where bitsandbytes
        would keep a table without values for later calls."""
        raise NotImplementedError

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in another type, [d_out, d_in]: a new tensor."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, for code that reads it: a new tensor every time."""
        return self.dequantised(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]

    def plain(self) -> nn.Linear | Conv1D:
        """Return the layer that this one stands for, with the dequantised weight."""
        with torch.device("meta"):
            made = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features)
            )
        weight = self.weight
        made.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        made.bias = self.bias
        made.train(self.training)
        return made


class Nf4Linear(QuantisedLinear):
    """4 bits per weight.

    Attributes:
        packed: two codes per byte.
        absmax: one 8-bit scale per block.
        offset: the mean of the scales.
        nested_absmax: one scale per block of scales.
        nested_code: the 256 values of an 8-bit code.
    """

    packed: Tensor
    absmax: Tensor
    offset: Tensor
    nested_absmax: Tensor
    nested_code: Tensor

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.is_meta:
            blocks = ceil(weight.numel() / BLOCK)
            return {
                "packed": weight.new_empty(ceil(weight.numel() / 2), 1, dtype=torch.uint8),
                "absmax": weight.new_empty(blocks, dtype=torch.uint8),
                "offset": weight.new_empty((), dtype=torch.float32),
                "nested_absmax": weight.new_empty(ceil(blocks / NESTED_BLOCK), dtype=torch.float32),
                "nested_code": weight.new_empty(256, dtype=torch.float32),
            }
        packed, state = bitsandbytes().quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        nested = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code.clone()}
        return {"packed": packed, "absmax": state.absmax, "offset": state.offset, **nested}

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        found = bitsandbytes()
        nested = found.QuantState(
            absmax=self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state = found.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype,
            blocksize=BLOCK,
            quant_type="nf4",
            offset=self.offset,
            state2=nested,
        )
        return cast(Tensor, found.dequantize_4bit(self.packed, state))


class Int8Linear(QuantisedLinear):
    """8 bits per weight.

    Attributes:
        codes: [d_out, d_in], from -127 to 127.
        absmax: [d_out], each row's largest absolute value.
    """

    codes: Tensor
    absmax: Tensor

    def quantise(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.is_meta:
            absmax = weight.new_empty(len(weight), dtype=torch.float32)
            return {"codes": torch.empty_like(weight, dtype=torch.int8), "absmax": absmax}
        codes, absmax, _ = bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16))  # it takes no other type
        return {"codes": codes, "absmax": absmax}

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype).mul_((self.absmax / LARGEST_CODE)[:, None])


LAYERS: dict[Quantised, type[QuantisedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear}


class _Product(torch.autograd.Function):
    """x Wᵀ + b with a frozen W that is not kept between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def quantise_layers(model: PreTrainedModel, precision: Quantised) -> None:
    """Replace the linear layers of the base model by quantised ones, in place; also on the meta device.

    Embeddings, norms, biases, the output layer and the task head stay as they are, and so do weights that several
    layers share, layers that transformers keeps in float32 (T5's `wo`), experts that are no linear layers, and layers
    of a family's own class, which may compute something else (Falcon's).

    Raises:
        ConfigError: there is nothing to quantise.
    """
    paths = list(_quantisable(model))
    if not paths:
        raise ConfigError(
            f"precision: {precision} quantises torch's own linear layers, and {type(model).__name__} has none below "
            "its output layer; use float32 or bfloat16"
        )
    for path in paths:
        model.set_submodule(path, LAYERS[precision](cast(Any, model.get_submodule(path))))


def dequantise_layers(model: PreTrainedModel) -> Quantised | None:
    """Replace quantised layers by plain ones with the dequantised weights, in place.

    Returns:
        How they were quantised; None: they were not.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            model.set_submodule(path, module.plain())
    options = LoadOptions.of(model.config)
    replace(options, quantised=None).store(model.config)
    return options.quantised


def _quantisable(model: PreTrainedModel) -> Iterator[str]:
    """Yield the paths of the layers that `quantise_layers` replaces."""
    within = {id(module) for module in model.base_model.modules()}
    output = model.get_output_embeddings()
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    kept = {
        name
        for module in model.modules()
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(module, attribute, None) or ()
    }
    for path, module in model.named_modules():
        plain = type(module) in (nn.Linear, Conv1D) and id(module) in within and module is not output
        if plain and uses[id(module.weight)] == 1 and not kept & set(path.split(".")):
            yield path


@cache
def bitsandbytes() -> Any:
    """Return bitsandbytes' functions. Its import recommends kernels for products that are not used here: not logged."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as found
    finally:
        logger.setLevel(level)
    return found
