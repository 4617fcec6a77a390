"""The predicted bytes of every place, against the tensors of live engines, formulas by hand, and a measured process."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_LLAMA
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.full import attach_full
from fedray.adapters.lora import attach_lora
from fedray.adapters.rows import hold_rows
from fedray.config import Config, LoraSection, Memory, TrainConfig, load_config, to_mapping
from fedray.config.clients import TierConfig
from fedray.experiment.outline import footprints as configured_footprints
from fedray.models.architecture import architecture
from fedray.models.backbone import meta_backbone
from fedray.planning.memory import Footprint
from fedray.training.base_model import load_base_model
from fedray.training.engine import make_engine
from fedray.training.engines.deepspeed import OffloadConfig
from fedray.training.schedule import Schedule

SHAPE = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 300,
    "max_position_embeddings": 40,
}
TINY = {**SHAPE, "num_labels": 3}
ALL_RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def footprints(method: Any = "fedavg", read_data: bool = False, **changes: Any) -> dict[str, Footprint]:
    """By tier; from a configuration alone unless data are read."""
    base = {
        "rounds": 1,
        "task": "classification",
        "method": method,
        "model": {"path": "random", "tokenizer": "bytes", "config": TINY},
        "data": {"source": "synthetic", "max_length": 16},
        "lora": {"rank": 2},
    }
    config = load_config(base, {path.replace("__", "."): value for path, value in changes.items()})
    (by_tier,) = configured_footprints(config, read_data).values()
    return {tier: footprint for tier, (_, footprint) in by_tier.items()}


# ---------------------------------------------------------------- against live engines


def tiny_config(method: Any) -> Config:
    return load_config(
        {
            "rounds": 1,
            "method": method,
            "model": {"path": "random", "tokenizer": "bytes", "config": SHAPE},
            "data": {"source": "synthetic"},
            "device": "cpu",
        }
    )


def backbone(device: str) -> nn.Module:
    section = tiny_config("fedavg").model
    model: nn.Module = meta_backbone(architecture(section, "classification", 3, None, 0), "classification")
    if device != "meta":
        model = model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    return model


def attach(kind: str, model: nn.Module) -> Adapter:
    if kind == "full":
        return attach_full(model)
    adapter = attach_lora(model, LoraSection(rank=3, alpha=4.0), rest_rank=2, mixer="adaptive")
    adapter.fit_capacity = hold_rows if kind == "masked" else None
    return adapter


def storages() -> dict[int, int]:
    """Bytes of the memory of every living tensor of floats: whole numbers are a batch's, and a model's few buffers."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.is_floating_point() and not thing.is_meta:
            for tensor in (thing, thing.grad) if thing.is_leaf and thing.grad is not None else (thing,):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


@pytest.mark.timeout(1800)  # the first use on a machine builds DeepSpeed's extensions
@pytest.mark.parametrize(
    ("kind", "stage", "train"),
    [
        ("lora", None, {}),
        ("lora", None, {"optimizer": "sgd"}),
        ("lora", None, {"optimizer": "sgd", "momentum": 0.9}),
        ("masked", None, {}),
        ("full", None, {}),
        ("lora", 0, {}),
        ("lora", 2, {}),
        ("lora", 2, {"accumulation": 2}),
        ("full", 2, {}),
        ("lora", 3, {}),
        ("masked", 3, {}),
    ],
)
def test_exactly_what_a_live_engine_holds(kind: str, stage: int | None, train: dict[str, Any]) -> None:
    """All tensors in the second step, when the optimizer has its state: before the parameters move, while gradients are
    there; with ZeRO, whose buffers stay, after it. 51 numbers of the head make odd lengths, which DeepSpeed rounds up;
    it also keeps the gradient that came first, of the head's bias: 12 bytes."""
    offload = {2: OffloadConfig(optimizer="cpu"), 3: OffloadConfig(params="cpu")}.get(stage or 0, OffloadConfig())
    engine_of = "torch" if stage is None else "deepspeed"
    raw = ALL_RELEASED if stage == 3 else {}
    tier = TierConfig(share=1, engine=engine_of, offload=offload, deepspeed=raw, mask_ratio=0.4)
    section = TrainConfig(**train)
    meta = backbone("meta")
    weights = sum(tensor.nbytes for tensor in (*meta.parameters(), *meta.buffers()))
    before = storages()
    adapter = attach(kind, backbone("cpu"))
    engine = make_engine(adapter, section, tier, "cpu")
    adapter.model.train()  # mixers keep statistics while they are evaluated
    engine.begin(Schedule(section, 0, 2))
    for step in range(2):
        for micro in range(section.accumulation):
            tokens = torch.ones(1, 1, dtype=torch.long)
            loss = adapter.model(input_ids=tokens, attention_mask=tokens).logits.square().sum()
            engine.backward(loss, last=micro + 1 == section.accumulation)
        if step == 0 or (stage or 0) > 0:
            engine.step()
    del tokens, loss
    found = sum(size for key, size in storages().items() if key not in before)
    engine.close()

    counted = attach(kind, meta)
    counted.fit(tier.capacity)
    held = tier.engine.memory(counted, weights, section)
    device, offloaded = held.device, held.host
    expected = device.total + offloaded.total
    if stage == 2:  # ends with every backward pass
        expected -= 4 * engine._zero.reduce_bucket_size
    if stage == 3:  # between two passes all weights are on the host
        expected -= device.weights
    expected -= sum(buffer.nbytes for buffer in counted.model.buffers() if not buffer.is_floating_point())
    assert abs(found - expected) <= 16, (found, expected, device, offloaded)


# ---------------------------------------------------------------- by hand

LORA = 4 * 2 * (2 * 16 + 16 * 2)
"""Bytes of r = 2 on query and value of one layer."""
HEAD = 4 * 3 * 17


def test_lora_by_hand() -> None:
    """Two layers; two moments per number, and a step of 4 bytes per tensor: 8 of the LoRA, 2 of the head. Embeddings
    (300 + 40 + 2) · 16 and their norm, layers, pooler and head in float32; two buffers of 40 positions in int64."""
    layer = 4 * (16 * 16 + 16) + 4 * 16 + 16 * 24 + 24 + 24 * 16 + 16
    base = 4 * ((300 + 40 + 2) * 16 + 32 + 2 * layer + 16 * 16 + 16) + HEAD + 2 * 8 * 40
    found = footprints()["default"]
    trained = 2 * LORA + HEAD
    assert found.device.weights == base
    assert found.device.adapter == 2 * LORA
    assert found.device.gradients == trained
    assert found.device.optimizer == 2 * trained + 4 * 10
    assert found.shared == base - HEAD
    assert found.offloaded == Memory()
    assert found.vectors == trained  # the common starting point
    assert found.private(on_gpu=False) == found.device.total - found.shared + found.vectors
    assert found.private(on_gpu=True) == found.vectors


def test_full_fine_tuning_holds_four_models() -> None:
    """Weights, gradients and two moments; nothing of it is shared but the buffers."""
    found = footprints({"name": "fedavg", "adapter": "full"})["default"]
    parameters = found.device.weights - 2 * 8 * 40
    assert found.device.gradients == parameters
    assert found.device.optimizer == pytest.approx(2 * parameters, abs=400)
    assert (found.device.adapter, found.shared) == (0, 2 * 8 * 40)


def test_tiers_differ() -> None:
    """Half the type, half the weights (the head stays float32); smaller batches and checkpoints, fewer activations;
    what is offloaded leaves the device."""
    offload = {"engine": "deepspeed", "offload": {"optimizer": "cpu"}}
    tiers = {
        "plain": {"share": 0.2},
        "half": {"share": 0.2, "precision": "bfloat16"},
        "small": {"share": 0.2, "batch_size": 2},
        "checkpointed": {"share": 0.2, "activation_checkpointing": True},
        "offloaded": {"share": 0.2, **offload},
    }
    found = footprints(clients__tiers=tiers, evaluation__batch_size=1)
    plain = found["plain"].device
    assert found["half"].device.weights == pytest.approx(plain.weights / 2, rel=0.05)
    assert found["half"].device.optimizer == plain.optimizer
    assert 3 < plain.activations / found["small"].device.activations < 5
    assert found["checkpointed"].device.activations < 0.9 * plain.activations
    assert found["offloaded"].device.optimizer == 0
    assert found["offloaded"].offloaded.optimizer >= 2 * plain.gradients


def test_quantised_layers_to_the_byte(tmp_path: Path) -> None:
    """Of a layer [n, m], nf4 takes nm / 2 bytes, one for each block of 64, 4 for each 256 blocks, 4 for their mean and
    1,024 for the table of 8-bit values; int8 nm and 4 n. The rest stays as it is, and all of it is mapped. A step also
    holds what a layer dequantises, so that its activations are more than those of the base model in float32."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quantised")
    shapes = 2 * [*4 * [(16, 16)], (24, 16), (16, 24)] + [(16, 16)]
    nf4 = sum(n * m // 2 + -(-n * m // 64) + 4 + 4 + 1024 for n, m in shapes)
    int8 = sum(n * m + 4 * n for n, m in shapes)
    float32 = sum(4 * n * m for n, m in shapes)
    names = ("float32", "nf4", "int8")
    found = footprints(clients__tiers={name: {"share": 1 / 3, "precision": name} for name in names})
    for name, size in zip(names, (float32, nf4, int8), strict=True):
        assert found[name].device.weights == found["float32"].device.weights - float32 + size
        assert found[name].shared == found[name].device.weights - HEAD
        assert found[name].device.adapter == 2 * LORA
        assert found[name].device.activations >= found["float32"].device.activations
    for name in names[1:]:
        tier, config = TierConfig(share=1, precision=name), tiny_config("fedavg")
        config = load_config(to_mapping(config), {"data.cache_dir": str(tmp_path)})
        arch = architecture(config.model, "classification", 3, None, 0)
        model = load_base_model(config, arch, name, tier, "cpu")
        assert sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) == found[name].device.weights


def test_clients_in_one_step_each_take_their_own() -> None:
    """Four clients: four times the gradients and moments, and beside the adapter two stacks of four; the base model is
    one. Where clients are trained one by one anyway, the number changes nothing."""
    alone, four = (footprints(clients__fuse=fuse)["default"] for fuse in ("off", 4))
    assert four.device.weights == alone.device.weights
    assert four.device.gradients == 4 * alone.device.gradients
    assert four.device.optimizer == 4 * alone.device.optimizer
    assert four.device.adapter == alone.device.adapter + 2 * 4 * alone.vectors
    assert 3 < four.device.activations / alone.device.activations < 5
    tiers = {"weak": {"share": 1.0, "engine": "deepspeed", "offload": {"optimizer": "cpu"}}}
    offloaded, same = (footprints(clients__tiers=tiers, clients__fuse=fuse)["weak"] for fuse in ("off", 4))
    assert same == offloaded


def test_steering_and_mean_gradients_take_a_vector_each() -> None:
    """Per client: FedProx its anchor, SCAFFOLD its shift and the sum of gradients; RoLoRA's parts take nothing."""
    plain, parts, prox, scaffold = (
        footprints(name, clients__fuse=2)["default"].device for name in ("fedavg", "rolora", "fedprox", "scaffold")
    )
    assert parts == plain
    assert prox.optimizer == plain.optimizer + plain.gradients
    assert scaffold.optimizer == plain.optimizer + 2 * plain.gradients
    assert (prox.adapter, prox.activations) == (plain.adapter, plain.activations)  # more than what passes in a step
    small = {"train__batch_size": 1, "evaluation__batch_size": 1, "data__max_length": 4}
    full, steered = (
        footprints({"name": n, "adapter": "full"}, **small)["default"].device for n in ("fedavg", "fedprox")
    )
    assert full.activations < 3 * full.gradients == steered.activations


def test_batches_are_no_larger_than_the_data(tmp_path: Path) -> None:
    """Clients have fewer than 100 test examples; nothing else depends on the data."""
    changes: dict[str, Any] = {"task": "causal_lm", "model__config": TINY_LLAMA, "evaluation__batch_size": 1000}
    changes |= {"data__examples_per_client": 60, "data__cache_dir": str(tmp_path)}
    changes |= {"partition__kind": "by_file", "clients__count": 2}
    read, full = (footprints(read_data=data, **changes)["default"] for data in (True, False))
    assert 10 * read.device.activations < full.device.activations
    assert (read.device.resting, read.vectors, read.shared) == (full.device.resting, full.vectors, full.shared)


def test_a_large_evaluation_counts() -> None:
    small, large = (footprints(evaluation__batch_size=size)["default"].device for size in (1, 1000))
    assert large.activations > 10 * small.activations
    assert (large.weights, large.gradients) == (small.weights, small.gradients)


def test_generated_texts_count() -> None:
    """Two blocks of one head of 16 numbers: 256 bytes of keys and values per token of every row, in batches of 8. 1,000
    new tokens outweigh everything else; four beams are four times as much, and so are four clients. Without texts, or
    where they are short, losses take more."""

    def activations(**changes: Any) -> int:
        changes = {"evaluation__metric": "rouge_l", "evaluation__max_new_tokens": 1000, **changes}
        config = TINY_LLAMA | {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
        base = {"task": "causal_lm", "model__config": config, "evaluation__batch_size": 8, "train__batch_size": 1}
        return footprints(**base, **changes)["default"].device.activations

    greedy, beams = activations(), activations(evaluation__generation={"num_beams": 4})
    cache = 8 * (16 + 999) * 256
    assert cache < greedy < 1.5 * cache
    assert 3.9 < beams / greedy < 4.1
    assert 3.9 < activations(clients__fuse=4) / greedy < 4.1
    assert activations(evaluation__max_new_tokens=1) == activations(evaluation__metric="perplexity")
