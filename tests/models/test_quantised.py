"""Quantised linear layers against formulas by hand, which layers they are, and the node's file of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fedray.config import ModelConfig
from fedray.errors import ConfigError
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone, meta_backbone
from fedray.models.load_options import LoadOptions
from fedray.models.quantised import LAYERS, Nf4Linear, QuantisedLinear
from fedray.types import Task

pytest.importorskip("bitsandbytes", reason="needs the extra quantised")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 300,
    "max_position_embeddings": 40,
}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": 300}


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nf4_values() -> Tensor:
    """The 16 values of NF4 (arXiv 2305.14314, section 3): quantiles of a normal distribution, seven below zero, zero,
    and eight above it, scaled to [-1, 1]; the outermost quantile is the mean of 1 - 1/30 and 1 - 1/32."""
    end = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (norm.ppf(torch.linspace(end, 0.5, count).double()[:-1]) for count in (9, 8))
    values = torch.tensor([*-below, 0.0, *above]).sort().values
    return (values / values.max()).float()


def test_weights_that_nf4_can_express_come_back() -> None:
    """Every block's largest absolute value is 2, so that all scales are their mean, which is kept in float32."""
    values = nf4_values()
    weight = 2 * values[torch.randint(16, (12, 128), generator=torch.Generator().manual_seed(0))]
    weight[:, ::64] = 2.0
    assert torch.allclose(Nf4Linear(linear(weight)).weight, weight, rtol=0, atol=1e-6)


def test_nf4_takes_the_nearest_value() -> None:
    """With one block per scale, the error is at most half of the largest gap between two values, and that of the
    8-bit scale: half a step, at most 1/64 of the largest deviation from the mean (arXiv 1511.04561)."""
    weight = drawn(12, 256)
    blocks = weight.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    gap = float(nf4_values().diff().max()) / 2
    error = (Nf4Linear(linear(weight)).weight.view(-1, 64) - blocks).abs()
    assert (error <= gap * scales + (scales - scales.mean()).abs().max() / 64).all()
    assert error.mean() > 0.02  # that it is rounded at all


def test_int8_rounds_to_a_row_s_largest_value() -> None:
    """A row's step is its largest absolute value / 127; float16, which bitsandbytes reads, adds 2^-11 of a weight."""
    weight = drawn(6, 40)
    weight[2] = 0
    largest = weight.abs().amax(1, keepdim=True)
    error = (LAYERS["int8"](linear(weight)).weight - weight).abs()
    assert (error <= largest / 127 / 2 + 2.0**-10 * weight.abs()).all()
    exact = torch.arange(-127, 128, 2)[None] / 127.0
    assert torch.allclose(LAYERS["int8"](linear(exact)).weight, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_gradients_are_those_of_the_dequantised_layer(
    kind: Any, dtype: torch.dtype, transposed: bool
) -> None:
    """The same product of the same matrix. Nothing of the size of a weight is kept for the backward pass."""
    before: nn.Linear | Conv1D = linear(drawn(24, 16).to(dtype), drawn(24, seed=1).to(dtype))
    if transposed:
        convolution = Conv1D(24, 16)
        convolution.weight, convolution.bias = nn.Parameter(before.weight.T.contiguous()), before.bias
        before = convolution.requires_grad_(False)
    layer = LAYERS[kind](before)
    plain = layer.plain()
    assert type(plain) is type(before)
    assert plain.weight.shape == before.weight.shape
    assert not torch.equal(plain.weight, before.weight)
    x, kept = drawn(3, 5, 16, seed=2).to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        y = layer(x)
    assert not kept
    upstream = drawn(3, 5, 24, seed=3).to(dtype)
    (found,) = torch.autograd.grad(y, x, upstream)
    wanted_y = plain(x)
    (wanted,) = torch.autograd.grad(wanted_y, x, upstream)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert torch.allclose(y, wanted_y, **tolerance)
    assert torch.allclose(found, wanted, **tolerance)


def held(config: dict[str, Any], task: Task, kind: Any) -> tuple[ModelConfig, PretrainedConfig]:
    section = ModelConfig(path="random", tokenizer="bytes", config=config)
    arch = architecture(section, task, 3, None, 0)
    replace(LoadOptions.of(arch), quantised=kind).store(arch)
    return section, arch


def quantised(model: nn.Module) -> Iterator[str]:
    return (path for path, module in model.named_modules() if isinstance(module, QuantisedLinear))


@pytest.mark.parametrize(
    ("config", "task", "within"),
    [
        (
            {"model_type": "bert", **SIZES},
            "classification",
            "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
            "output.dense bert.pooler.dense",
        ),
        (
            {"model_type": "llama", **SIZES},
            "causal_lm",
            "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        ),
        ({"model_type": "gpt2", **GPT2}, "causal_lm", "c_attn attn.c_proj c_fc mlp.c_proj"),
        (
            {"model_type": "t5", **T5, "vocab_size": 300},
            "classification",
            "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o DenseReluDense.wi",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_which_layers(config: dict[str, Any], task: Task, within: str) -> None:
    """Not the embeddings, the output layer, the task head, or what transformers keeps in float32 (T5's wo)."""
    model = meta_backbone(held(config, task, "nf4")[1], task)
    found = list(quantised(model))
    if config["model_type"] == "t5":
        found = [path for path in found if ".encoder." in path]
    names = within.split()
    assert len(found) == len(names)
    assert all(any(path.endswith(name) for path in found) for name in names)


def test_a_model_without_linear_layers_is_refused() -> None:
    config = {"model_type": "openai-gpt", "n_embd": 16, "n_layer": 0, "n_head": 2, "vocab_size": 300}
    with pytest.raises(ConfigError, match="precision: nf4 quantises torch's own linear layers, and OpenAIGPT"):
        meta_backbone(held(config, "causal_lm", "nf4")[1], "causal_lm")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_once_per_node_and_mapped(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes on the meta device are those of the real tensors, which lie in the mapped file in every process; the first
    process quantises, and no other."""
    section, arch = held({"model_type": "llama", **SIZES}, "causal_lm", kind)
    first = load_backbone(section, arch, "causal_lm", 0, "cpu", tmp_path)
    quantise = LAYERS[kind].quantise

    def of_shapes(layer: QuantisedLinear, weight: Tensor) -> dict[str, Tensor]:
        assert weight.is_meta
        return quantise(layer, weight)

    monkeypatch.setattr(LAYERS[kind], "quantise", of_shapes)
    model = load_backbone(section, arch, "causal_lm", 0, "cpu", tmp_path)
    (file,) = (tmp_path / "backbones").glob("*.safetensors")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file.name)]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    shapes = meta_backbone(arch, "causal_lm")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        same, other = shapes.get_parameter_or_buffer(name), first.get_parameter_or_buffer(name)
        assert (same.shape, same.dtype, tensor.requires_grad) == (tensor.shape, tensor.dtype, False), name
        assert torch.equal(tensor, other), name
        assert any(start <= tensor.data_ptr() < stop for start, stop in ranges), name
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    numbers = 24 * 16  # 6 blocks, one block of scales; the table of 8-bit values has 256 float32
    by_hand = {"nf4": numbers // 2 + 6 + 4 + 4 + 4 * 256, "int8": numbers + 4 * 24}[kind]
    assert sum(part.nbytes for part in layer.buffers()) == by_hand
