"""What DeepSpeed holds of a model at a time: its limits by hand, and counted while it trains."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedray.adapters.adapter import Adapter
from fedray.adapters.full import attach_full
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection, TrainConfig
from fedray.training.deepspeed_engine import DeepSpeedEngine
from fedray.training.engines.deepspeed import DeepSpeedConfig, OffloadConfig, engine_config
from fedray.training.schedule import Schedule
from fedray.training.zero_sizes import fill_in_sizes, largest_block

TRAIN = TrainConfig(batch_size=2)
HOST, OPTIMIZER = OffloadConfig(params="cpu"), OffloadConfig(optimizer="cpu")

EMBEDDING = 500 * 32
"""Parameters of the embedding, and of the head, which is not tied to it."""
LORA = 2 * (4 * 32 + 32 * 4)
"""Of one block: rank 4 on query and value."""
BLOCK = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32 + LORA
"""Attention, feed-forward part and two norms, with LoRA."""
BLOCKS = 8


def llama(device: str = "meta", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    with torch.device(device):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, num_key_value_heads=4, vocab_size=500, tie_word_embeddings=False)
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def adapted(**model: Any) -> Adapter:
    return attach_lora(llama(**model), LoraSection(rank=4, alpha=8.0))


def zero_section(adapter: Adapter, offload: OffloadConfig, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """The section as DeepSpeed gets it."""
    zero: dict[str, Any] = engine_config(TRAIN, offload, {"zero_optimization": own or {}})["zero_optimization"]
    fill_in_sizes(zero, adapter)
    return zero


def test_the_limits_are_those_of_the_models_blocks() -> None:
    adapter = adapted()
    assert largest_block(adapter.model) == BLOCK == 10_816
    assert zero_section(adapter, HOST) == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "reduce_bucket_size": BLOCKS * LORA,  # all that trains is less than a block
        "stage3_max_live_parameters": 2 * BLOCK,
        "stage3_max_reuse_distance": 2 * BLOCK,
        "stage3_prefetch_bucket_size": BLOCK,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_model_persistence_threshold": BLOCK,
    }


def test_gradients_of_a_whole_model_pass_in_one_blocks_room() -> None:
    full = attach_full(llama())
    assert zero_section(full, OPTIMIZER)["reduce_bucket_size"] == BLOCK - LORA
    config = DeepSpeedConfig(offload=OPTIMIZER)
    weights = sum(parameter.nbytes for parameter in full.model.parameters())
    held = config.memory(full, weights, TRAIN)
    assert held.device.optimizer == 0
    assert held.device.gradients == 4 * (BLOCK - LORA) + 4 * EMBEDDING  # and the largest parameter's, before it leaves
    assert held.host.optimizer >= 4 * weights


def test_values_of_ones_own_win_and_auto_is_filled_in() -> None:
    own = {
        "stage3_max_live_parameters": 7,
        "stage3_prefetch_bucket_size": "auto",
        "reduce_bucket_size": 99,
        "stage3_param_persistence_threshold": 0,
    }
    found = zero_section(adapted(), HOST, own)
    assert {name: found[name] for name in own} == own | {"stage3_prefetch_bucket_size": BLOCK}


def test_nothing_is_fetched_ahead_from_a_disk() -> None:
    offload = OffloadConfig(params="nvme", path="/fast")
    found = zero_section(adapted(), offload)
    assert found["offload_param"]["buffer_size"] == EMBEDDING
    for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"):
        assert found[name] == 0


def test_the_prediction_by_hand() -> None:
    """bfloat16 weights, float32 LoRA. With a threshold below the smallest matrix (32 · 32), norms and LoRA stay on the
    device, less than one block."""
    adapter = adapted(dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in llama(dtype=torch.bfloat16).parameters())

    def predicted(**own: Any) -> int:
        raw = {"zero_optimization": {"stage3_param_persistence_threshold": 1000, **own}}
        return DeepSpeedConfig(offload=HOST, deepspeed=raw).memory(adapter, weights, TRAIN).device.weights

    norms = (2 * BLOCKS + 1) * 32
    staying = 4 * BLOCKS * LORA + 2 * norms
    assert predicted() == staying + 2 * (2 * BLOCK + EMBEDDING)
    assert predicted(stage3_max_live_parameters=0) == staying + 2 * (BLOCK + EMBEDDING)  # half the reuse distance
    assert predicted(stage3_max_live_parameters=0, stage3_max_reuse_distance=0) == staying + 2 * EMBEDDING
    assert predicted(stage3_prefetch_bucket_size=0) == staying + 2 * (BLOCK + EMBEDDING)
    assert predicted(stage3_max_live_parameters=10**9) == weights + 4 * BLOCKS * LORA


@pytest.mark.timeout(1800)  # the first use on a machine builds DeepSpeed's extensions
@pytest.mark.parametrize("bounded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_more_weights_are_live_than_predicted(bounded: bool) -> None:
    """Counted after every module that DeepSpeed fetches, over four steps: it fetches ahead from the third one on. With
    its own limits all weights are there at the end of the forward pass."""
    own = {"stage3_param_persistence_threshold": 1000}
    if not bounded:
        own |= {f"stage3_max_{of}": 10**9 for of in ("live_parameters", "reuse_distance")}
        own["stage3_prefetch_bucket_size"] = 5 * 10**7
    raw = {"zero_optimization": own}
    counted = adapted()
    weights = sum(parameter.nbytes for parameter in llama().parameters())
    predicted = DeepSpeedConfig(offload=HOST, deepspeed=raw).memory(counted, weights, TRAIN).device.weights
    engine = DeepSpeedEngine(adapted(device="cpu"), TRAIN, HOST, raw, "cpu")
    zero = engine._engine._config.zero_config
    assert zero.max_live_parameters == (2 * BLOCK if bounded else 10**9)
    assert zero.prefetch_bucket_size == (BLOCK if bounded else 5 * 10**7)
    coordinator = engine._zero.parameter_offload.get_param_coordinator()
    fetch, live = coordinator.fetch_sub_module, []

    def count(*args: Any, **kwargs: Any) -> None:
        fetch(*args, **kwargs)
        there = [p for p in engine.adapter.model.parameters() if p.ds_status.name != "NOT_AVAILABLE"]
        live.append(sum(p.ds_numel * p.itemsize for p in there))

    coordinator.fetch_sub_module = count
    engine.begin(Schedule(TRAIN, 0, 4))
    engine.adapter.model.train()
    for _ in range(4):
        loss = engine.adapter.model(input_ids=torch.arange(12).reshape(2, 6)).logits.square().mean()
        engine.backward(loss, last=True)
        engine.step()
    moved = [engine.adapter.read(name) for name in engine.adapter.names]
    engine.close()
    assert all(np.isfinite(vector).all() for vector in moved)
    whole = weights + 4 * BLOCKS * LORA
    assert predicted < 0.4 * whole if bounded else predicted == whole
    assert 0.9 * predicted < max(live) <= predicted
