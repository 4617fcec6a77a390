"""DeepSpeed's engines with settings of their own: optimizers, schedules, where weights are, and what is refused."""

import gc

import numpy as np
import pytest
import torch
from deepspeed_rounds import (
    CALLS,
    LORA,
    OFFLOADS,
    RAW,
    STAGES,
    TRAIN,
    assert_close,
    engine_of,
    plain,
    run,
    start,
    values,
)
from transformers import LlamaConfig, LlamaForCausalLM

from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import LoraSection, ReftSection
from fedray.errors import ConfigError
from fedray.training import deepspeed_engine as engines
from fedray.training.deepspeed_engine import DeepSpeedEngine
from fedray.training.engines.deepspeed import OffloadConfig
from fedray.training.loop import Train, train_steps
from fedray.training.schedule import Schedule
from fedray.training.steering import Proximal
from fedray.training.torch_engine import TorchEngine
from fedray.training.training_context import TrainingContext

pytestmark = pytest.mark.timeout(1800)  # the first use on a machine builds DeepSpeed's extensions


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_parts_and_steering_in_stage_0_are_those_of_torch(backbone, examples, call, optimizer):
    """Then everything trains again, on the same engine."""
    train = TRAIN.model_copy(update={"optimizer": optimizer, "clip": 0.5})
    context, found = TrainingContext("classification", train, 3, 0), []
    for engine in (DeepSpeedEngine(plain(backbone), train, OFFLOADS[0], {}, "cpu"), TorchEngine(plain(backbone))):
        first = start(engine, "ann")
        for name, vector in first.items():
            engine.adapter.load(name, vector)
        anchor = Proximal(start(engine, "bob"), call["steering"]) if "steering" in call else None
        table = examples("classification", 9, 1)
        trained = train_steps(engine, Train(table, "ann", 0, **{**call, "steering": anchor}), context)
        after = {name: engine.adapter.read(name) for name in engine.adapter.names}
        train_steps(engine, Train(table, "ann", 0, steps=2), context)
        found.append((first, after, trained.mean_gradient, values(engine)))
        engine.close()
    (first, ours, our_mean, ours_later), (_, theirs, their_mean, theirs_later) = found
    resting = ~plain(backbone).layout("lora").mask({part.removeprefix("lora.") for part in call.get("parts", "AB")})
    assert np.array_equal(ours["lora"][resting], first["lora"][resting])
    assert np.array_equal(ours["head"], first["head"]) == (call.get("parts") == ("lora.B",))
    for ours_, theirs_ in ((ours, theirs), (our_mean, their_mean)):
        for name, vector in theirs_.items():
            assert np.linalg.norm(ours_[name] - vector) <= 1e-4 * np.linalg.norm(vector)
    assert np.linalg.norm(ours_later - theirs_later) <= 1e-4 * np.linalg.norm(theirs_later)


@STAGES
def test_micro_batches_whose_prompts_are_too_short_for_interventions(backbone, stage):
    """Steps of a long prompt, of a long and a short one in either order, of a short one alone, which moves nothing."""
    moved = []
    for offload in (True, False):
        section = ReftSection(rank=2, positions="f1+l1", short_prompts="halves")
        adapter = attach_reft(backbone("causal_lm"), section)
        engine = engine_of(adapter, TRAIN, stage) if offload else TorchEngine(adapter)
        before = start(engine, "ann")["reft"]
        engine.adapter.load("reft", before)
        engine.begin(Schedule(TRAIN, 0, 10))
        for lengths in ((6,), (6, 1), (1, 6), (1,), (6,)):
            for number, length in enumerate(lengths):
                tokens = torch.arange(3, 3 + length)[None]
                loss = engine.adapter.model(input_ids=tokens).logits.square().mean()
                assert loss.requires_grad == (length > 1)
                engine.backward(loss, last=number + 1 == len(lengths))
            engine.step()
        assert engine.finite()
        moved.append(engine.adapter.read("reft") - before)
        engine.close()
    assert np.linalg.norm(moved[1]) > 0.05
    assert np.linalg.norm(moved[0] - moved[1]) <= 1e-3 * np.linalg.norm(moved[1])


def test_base_weights_stay_where_they_are(backbone):
    model = backbone("classification")
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if "query" not in name}
    engine = DeepSpeedEngine(attach_lora(model, LORA), TRAIN, OFFLOADS[2], {}, "cpu")
    now = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert {name for name, place in places.items() if now.get(name, place) != place} <= {
        "classifier.weight",  # trained: in the engine's flat buffer now
        "classifier.bias",
    }
    engine.close()


def test_a_bfloat16_head_is_refused(backbone):
    adapter = attach_lora(backbone("classification").to(torch.bfloat16), LORA)
    with pytest.raises(ConfigError, match="classifier.weight is bfloat16.*precision: float32, or engine: torch"):
        DeepSpeedEngine(adapter, TRAIN, OFFLOADS[2], {}, "cpu")


@STAGES
def test_sgd(backbone, examples, stage):
    train = TRAIN.model_copy(update={"optimizer": "sgd", "momentum": 0.9})
    adapter = plain(backbone)
    if stage > 0:
        with pytest.raises(ConfigError, match="train.optimizer: sgd .*use train.optimizer: adamw, or offload: none"):
            DeepSpeedEngine(adapter, train, OFFLOADS[stage], {}, "cpu")
        return
    found = []
    for engine in (DeepSpeedEngine(adapter, train, OFFLOADS[0], {}, "cpu"), TorchEngine(plain(backbone))):
        for name, vector in start(engine, "ann").items():
            engine.adapter.load(name, vector)
        request = Train(examples("classification", 9, 1), "ann", 0)
        train_steps(engine, request, TrainingContext("classification", train, 3, 0))
        found.append(values(engine))
    assert np.linalg.norm(found[0] - found[1]) <= 1e-5 * np.linalg.norm(found[1])


@STAGES
@pytest.mark.parametrize("server_round", [0, 2])
def test_a_schedule_through_the_run_is_torchs(backbone, examples, stage, server_round):
    """Rounds 0 and 2 of 3 with ten steps each, of which the first 12 are the warm-up; the head has its own peak."""
    fields = {"schedule": "cosine", "schedule_over": "run", "warmup_steps": 0.4, "min_lr": 0.001}
    train, found = TRAIN.model_copy(update=fields), []
    for offload in (True, False):
        adapter = plain(backbone)
        engine = engine_of(adapter, train, stage) if offload else TorchEngine(adapter)
        for name, vector in start(engine, "ann").items():
            engine.adapter.load(name, vector)
        before = values(engine)
        request = Train(examples("classification", 9, 1), "ann", server_round)
        losses = train_steps(engine, request, TrainingContext("classification", train, 3, 0, rounds=3)).losses
        found.append((before, values(engine), losses))
        engine.close()
    assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 512])
def test_nvme_is_the_cpu_with_the_weights_in_the_folder(tmp_path, examples, rank):
    """DeepSpeed swaps tensors of at least 1 MB: with d = 512 the base's weights, with rank 512 the adapter's, too."""
    engines.compile_extensions(OffloadConfig(), "cpu")
    from deepspeed.ops import op_builder

    if not op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio and its headers are not installed")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    found = []
    for offload in (OffloadConfig(params="cpu"), OffloadConfig(params="nvme", path=str(tmp_path))):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=8, vocab_size=1000)).requires_grad_(False)
        adapter = attach_lora(model, LoraSection(rank=rank, alpha=rank, dropout=0.2))
        engine = DeepSpeedEngine(adapter, TRAIN, offload, {}, "cpu")
        found += [run(engine, examples, num_examples=9) for _ in range(2)]
        stored = sum(file.stat().st_size for file in tmp_path.rglob("*.swp"))
        assert stored >= (4 * (4 * 512 * 512 + 3 * 512 * 1024) * 2 if offload.params == "nvme" else 0)
        engine.close()
    assert np.linalg.norm(found[0][1] - found[0][0]) > 0.1
    for before, after, losses in found[1:]:
        assert np.array_equal(before, found[0][0])
        assert np.array_equal(after, found[0][1])
        assert losses == found[0][2]


def test_nvme_without_libaio_says_what_to_install(backbone, monkeypatch):
    engines.compile_extensions(OffloadConfig(), "cpu")
    from deepspeed.ops import op_builder

    monkeypatch.setattr(op_builder.AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ConfigError, match="libaio-dev.* or use params: cpu"):
        DeepSpeedEngine(plain(backbone), TRAIN, OffloadConfig(params="nvme", path="/fast"), {}, "cpu")


def test_a_closed_engine_gives_the_weights_back(backbone, examples):
    adapter = plain(backbone)
    engine = DeepSpeedEngine(adapter, TRAIN, OFFLOADS[3], RAW[3], "cpu")
    run(engine, examples)
    engine.close()
    gc.collect()
    assert sum(parameter.ds_tensor.numel() for parameter in adapter.model.parameters()) == 0
