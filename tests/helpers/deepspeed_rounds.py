"""DeepSpeed's stages, calls of training, and a client's round with any engine: what tests of DeepSpeed share."""

import numpy as np
import pytest

from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection, TrainConfig
from fedray.training.deepspeed_engine import DeepSpeedEngine
from fedray.training.engines.deepspeed import OffloadConfig
from fedray.training.loop import Train, train_steps
from fedray.training.training_context import TrainingContext

OFFLOADS = {0: OffloadConfig(), 2: OffloadConfig(optimizer="cpu"), 3: OffloadConfig(params="cpu")}
RAW = {3: {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
STAGES = pytest.mark.parametrize("stage", OFFLOADS)
TRAIN = TrainConfig(
    lr=0.01, head_lr=0.03, batch_size=2, accumulation=2, epochs=10, max_steps=10, weight_decay=0.1, schedule="linear"
)
ROWS = np.array([1, 4, 5, 6, 7, 12, 14, 15])

LORA = LoraSection(rank=2, alpha=4.0, dropout=0.2)

CALLS = {
    "part": {"parts": ("lora.B",)},
    "head": {"parts": ("head",), "steps": 3},
    "steered": {"steering": 0.5, "mean_gradient": True},
    "steered part": {"parts": ("lora.A", "head"), "steering": 0.5, "mean_gradient": True, "phase": 2},
}
"""Arguments of a training; `steering` is the pull towards another client's values."""


def plain(backbone):
    return attach_lora(backbone("classification"), LORA)


def engine_of(adapter, train, stage):
    """A new DeepSpeed engine of the stage."""
    return DeepSpeedEngine(adapter, train, OFFLOADS[stage], RAW.get(stage, {}), "cpu")


def task_of(engine):
    return "causal_lm" if hasattr(engine.adapter.model, "lm_head") else "classification"


def start(engine, client):
    """A client's first values, of size 0.2, so that nothing is zero; another client has others."""
    rng = np.random.default_rng(sum(map(ord, client)))
    sizes = {name: engine.adapter.layout(name).size for name in engine.adapter.names}
    return {name: rng.normal(0, 0.2, size).astype(np.float32) for name, size in sizes.items()}


def values(engine):
    return np.concatenate([engine.adapter.read(name) for name in engine.adapter.names])


def run(engine, examples, client="ann", num_examples=11, rows=ROWS):
    """One client's round from fresh values; returns what it started from, what it came to, and the losses."""
    if engine.adapter.fit_capacity is not None:
        engine.adapter.set_rows(dict.fromkeys(engine.adapter.targets, rows))
    for name, vector in start(engine, client).items():
        engine.adapter.load(name, vector)
    before, task = values(engine), task_of(engine)
    training_context = TrainingContext(task, TRAIN, seed=3, pad_token_id=0)
    trained = train_steps(engine, Train(examples(task, num_examples, 1), client, 0), training_context)
    return before, values(engine), trained.losses


def assert_close(ours, theirs):
    """ours, theirs: (before, after, losses)."""
    assert np.array_equal(ours[0], theirs[0])
    assert np.linalg.norm(ours[1] - theirs[1]) <= 1e-4 * np.linalg.norm(theirs[1])
    moved = [np.linalg.norm(after - before) for before, after, _ in (ours, theirs)]
    assert moved[1] > 0.1
    assert abs(moved[0] - moved[1]) <= 1e-3 * moved[1]
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-3)
