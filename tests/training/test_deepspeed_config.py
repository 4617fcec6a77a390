"""DeepSpeed's configuration, the user's own merged over it, and builds of its extensions that were killed."""

import pytest

from fedray.config import TrainConfig
from fedray.errors import ConfigError
from fedray.training import deepspeed_engine as engines
from fedray.training.engines.deepspeed import OffloadConfig, engine_config, zero_stage

TRAIN = TrainConfig(batch_size=2, accumulation=2, schedule="linear")


@pytest.mark.parametrize(
    ("offload", "raw", "message"),
    [
        (
            {"params": "cpu"},
            {"zero_optimization": {"stage": 1}},
            "here.zero_optimization.stage: 1 contradicts offload {params: cpu}, which needs stage 3",
        ),
        ({}, {"zero_optimization": {"stage": 2}}, "stage: 2 contradicts offload: none, which needs stage 0"),
        (
            {"optimizer": "cpu"},
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "offload_param.device: cpu contradicts offload {optimizer: cpu}, which needs none",
        ),
        (
            {"params": "nvme", "path": "/fast"},
            {"zero_optimization": {"offload_param": {"nvme_path": "/slow"}}},
            "nvme_path: /slow contradicts offload.path: /fast",
        ),
        ({}, {"train_micro_batch_size_per_gpu": 3}, "_per_gpu: 3 contradicts train.batch_size: 2"),
        ({}, {"train_batch_size": 3}, "size: 3 contradicts train.batch_size: 2 times train.accumulation: 2"),
        ({}, {"gradient_accumulation_steps": 1}, "steps: 1 contradicts train.accumulation: 2"),
        ({}, {"gradient_clipping": 0.5}, "gradient_clipping: 0.5 contradicts train.clip: 1.0"),
        ({}, {"bf16": {"enabled": True}}, "bf16.enabled: true contradicts the base model's type"),
        ({}, {"fp16": {"enabled": True}}, "fp16.enabled: true contradicts the base model's type"),
        ({}, {"optimizer": {"type": "Adam"}}, "contradicts train.optimizer: adamw"),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "contradicts train.schedule: linear"),
        ({}, {"zero_optimization": 3}, "here.zero_optimization: expected a mapping, got 3"),
    ],
)
def test_a_configuration_of_ones_own_must_not_contradict(offload, raw, message):
    with pytest.raises(ConfigError) as caught:
        engine_config(TRAIN, OffloadConfig(**offload), raw, where="here")
    assert message in str(caught.value)


def test_a_configuration_of_ones_own_is_merged():
    raw = {
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3, "offload_param": {"pin_memory": False}, "sub_group_size": 1000},
    }
    assert engine_config(TRAIN, OffloadConfig(params="cpu"), raw) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 4,
        "gradient_clipping": 1.0,
        "bf16": {},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 1000,
            "offload_param": {"device": "cpu", "pin_memory": False},
            "offload_optimizer": {"device": "cpu"},
        },
    }
    assert raw["gradient_clipping"] == "auto"
    assert zero_stage(OffloadConfig(params="nvme", path="/fast")) == 3


class Builder:
    name = "fedray_test_extension"

    def __init__(self, error=None):
        self.error, self.loaded = error, 0

    def load(self, verbose):
        self.loaded += 1
        if self.error:
            raise self.error


def test_builds_that_were_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(engines, "BUILD_PATIENCE_S", 0.1)
    folder = tmp_path / Builder.name
    engines._load(Builder())
    (folder / "lock").touch()
    with pytest.raises(ConfigError, match="lock has been there for .*delete that file"):
        engines._load(Builder())
    (folder / "fedray.building").touch()  # what a killed process of ours leaves beside it
    builder = Builder()
    engines._load(builder)
    assert builder.loaded == 1
    assert sorted(path.name for path in folder.iterdir()) in ([], ["fedray.lock"])
    with pytest.raises(ConfigError, match="cannot be built in .*: no compiler. It needs g\\+\\+"):
        engines._load(Builder(RuntimeError("no compiler")))
