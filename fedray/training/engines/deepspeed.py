"""`engine: deepspeed`: DeepSpeed with ZeRO-Offload, its settings and what it holds.

DeepSpeed's own configuration follows from the tier and the section `train`, and the user's is merged over it. Nothing
here imports deepspeed, so that a configuration can be checked before anything starts.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedray.config import EngineConfig, EngineMemory, Memory, Section, TrainConfig, absolute
from fedray.errors import ConfigError

AUTO = "auto"
"""What configurations written for transformers' Trainer have where it fills in a value; here fedray does."""


class OffloadConfig(Section):
    """What is kept off the device."""

    optimizer: Literal["none", "cpu"] = "none"
    """Where Adam's moments and step are computed and kept (ZeRO-2)."""
    params: Literal["none", "cpu", "nvme"] = "none"
    """Where all weights are kept between their uses; cpu and nvme include the optimizer (ZeRO-3)."""
    path: str | None = None
    """params: nvme: folder on the fast disk."""

    @model_validator(mode="after")
    def _path(self) -> Self:
        if self.params == "nvme" and not self.path:
            raise ValueError("params: nvme needs `path`, a folder on the fast disk")
        if self.path and self.params != "nvme":
            raise ValueError(f"path: only params: nvme writes to a folder, got params: {self.params}")
        return self


class DeepSpeedConfig(EngineConfig):
    """DeepSpeed; see `fedray.training.deepspeed_engine`."""

    name: ClassVar[str] = "deepspeed"
    prepares_node: ClassVar[bool] = True

    offload: OffloadConfig = OffloadConfig()
    """`none`, or what is kept off the device."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """A configuration of DeepSpeed's own that is merged over fedray's."""

    @field_validator("offload", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return {} if value == "none" else value

    @property
    def weights_on_host(self) -> bool:
        """Stage 3 moves parameters to the device one by one: the whole model may be larger than that."""
        return zero_stage(self.offload) == 3

    @property
    def steps_on_host(self) -> bool:
        return zero_stage(self.offload) > 0

    @property
    def steers(self) -> bool:
        """In stage 0 gradients stay in the parameters; the others move them into buffers as they arise."""
        return zero_stage(self.offload) == 0

    def with_absolute_paths(self, folder: Path) -> Self:
        if self.offload.path is None:
            return self
        offload = self.offload.model_copy(update={"path": absolute(self.offload.path, folder)})
        return self.model_copy(update={"offload": offload})

    def check(self, train: TrainConfig, where: str) -> None:
        engine_config(train, self.offload, self.deepspeed, f"{where}.deepspeed")

    def prepare_node(self, device: str) -> None:
        from fedray.training.deepspeed_engine import compile_extensions

        compile_extensions(self.offload, device)

    def memory(self, adapter: Any, weights: int, train: TrainConfig) -> EngineMemory:
        """Return what is held, by ZeRO stage.

        Stage 3 brings weights to the device as they are used: what is held there at most is counted
        (`fedray.training.zero_sizes`). `params: nvme` counts as `cpu`. The user's own `deepspeed` counts by its bucket
        sizes and limits.
        """
        from fedray.training.memory import FLOAT32, inserted_bytes, optimizer_bytes, plain_memory, trained_bytes
        from fedray.training.zero_sizes import fill_in_sizes, live_bytes

        groups, stage = adapter.trainable_groups(), zero_stage(self.offload)
        if stage == 0:
            return plain_memory(adapter, weights, optimizer_bytes(groups, train))
        inserted, trained = inserted_bytes(adapter, weights), trained_bytes(groups)
        zero = engine_config(train, self.offload, self.deepspeed)["zero_optimization"]
        fill_in_sizes(zero, adapter)
        bucket = FLOAT32 * int(zero["reduce_bucket_size"])
        if stage == 2:
            flat = sum(_even(sum(p.numel() for p in group.parameters)) for group in groups) * FLOAT32
            largest = max(p.nbytes for group in groups for p in group.parameters)
            accumulated = trained if train.accumulation > 1 else 0
            return EngineMemory(
                Memory(weights, inserted + flat - trained, bucket + largest),
                Memory(gradients=flat + largest + accumulated, optimizer=4 * flat),  # masters, a copy, two moments
                moves_gradients=True,
            )
        return EngineMemory(
            Memory(weights=live_bytes(zero, adapter.model), gradients=bucket),
            Memory(weights, inserted, gradients=2 * trained, optimizer=3 * trained),  # masters, two moments
            moves_gradients=True,
        )

    def build(self, adapter: Any, train: TrainConfig, device: str, process_group: Any) -> Any:
        from fedray.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(adapter, train, self.offload, self.deepspeed, device)


ENTRY = DeepSpeedConfig


@dataclass(frozen=True)
class Fixed:
    """A value that follows from another setting.

    Attributes:
        value: of DeepSpeed's key; None: the key must not be there.
        source: the other setting, for error messages.
    """

    value: Any
    source: str


def zero_stage(offload: OffloadConfig) -> int:
    """Return the ZeRO stage: 0 nothing is offloaded, 2 the optimizer, 3 the parameters, too."""
    if offload.params != "none":
        return 3
    return 2 if offload.optimizer == "cpu" else 0


def engine_config(
    train: TrainConfig, offload: OffloadConfig, raw: Mapping[str, Any], where: str = "deepspeed"
) -> dict[str, Any]:
    """Return DeepSpeed's configuration. A pure function, for validation as well as for the engine.

    Args:
        train: with the tier's batch_size and accumulation.
        offload: what is kept off the device.
        raw: the user's own; merged in at any depth.
        where: the setting that holds `raw`, for messages, e.g. `clients.tiers.weak.deepspeed`.

    Raises:
        ConfigError: a key of `raw` contradicts what the tier or the section `train` says, or acts on what fedray does
            without DeepSpeed; or an optimizer that cannot be offloaded.
    """
    if train.optimizer != "adamw" and zero_stage(offload) > 0:
        raise ConfigError(
            f"train.optimizer: {train.optimizer} cannot be combined with {_show(offload)}, which computes AdamW on the "
            "CPU; use train.optimizer: adamw, or offload: none"
        )
    merged: dict[str, Any] = {}
    _merge(merged, raw, _fixed(train, offload), where, "")
    for key, fixed in _fixed(train, offload).items():  # DeepSpeed's own default is off
        if fixed.value not in (None, False, "none"):
            _put(merged, key, fixed.value)
    return merged


def _fixed(train: TrainConfig, offload: OffloadConfig) -> dict[str, Fixed]:
    """Return what follows from other settings by dotted key; value None: the key must not be there."""
    stage, shown = zero_stage(offload), _show(offload)
    folder = offload.path if offload.params == "nvme" else None
    optimizer = "cpu" if stage else "none"
    precision = "the base model's type (model.dtype, or the tier's precision) and float32 adapters"
    found = {
        "train_micro_batch_size_per_gpu": Fixed(train.batch_size, f"train.batch_size: {train.batch_size}"),
        "gradient_accumulation_steps": Fixed(train.accumulation, f"train.accumulation: {train.accumulation}"),
        "train_batch_size": Fixed(
            train.batch_size * train.accumulation,
            f"train.batch_size: {train.batch_size} times train.accumulation: {train.accumulation}",
        ),
        "gradient_clipping": Fixed(train.clip or 0.0, f"train.clip: {'null' if train.clip is None else train.clip}"),
        "optimizer": Fixed(None, f"train.optimizer: {train.optimizer}"),
        "scheduler": Fixed(None, f"train.schedule: {train.schedule}"),
        "zero_optimization.stage": Fixed(stage, f"{shown}, which needs stage {stage}"),
        "zero_optimization.offload_optimizer.device": Fixed(optimizer, f"{shown}, which needs {optimizer}"),
        "zero_optimization.offload_param.device": Fixed(offload.params, f"{shown}, which needs {offload.params}"),
        "zero_optimization.offload_param.nvme_path": Fixed(folder, f"offload.path: {folder}"),
        "zero_optimization.cpu_offload": Fixed(None, shown),
        "zero_optimization.cpu_offload_param": Fixed(None, shown),
    }
    for section in ("fp16", "bf16", "bfloat16", "amp", "torch_autocast"):
        found[f"{section}.enabled"] = Fixed(False, precision)
    return found


def _merge(into: dict[str, Any], raw: Mapping[str, Any], fixed: Mapping[str, Fixed], where: str, prefix: str) -> None:
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if key in fixed:
            _check(key, value, fixed[key], where)
        elif isinstance(value, Mapping):
            _merge(into.setdefault(name, {}), value, fixed, where, f"{key}.")
        elif any(other.startswith(f"{key}.") for other in fixed):
            raise ConfigError(f"{where}.{key}: expected a mapping, got {value!r}")
        else:
            into[name] = copy.deepcopy(value)


def _check(key: str, value: Any, fixed: Fixed, where: str) -> None:
    if value not in (fixed.value, AUTO):
        shown = str(value).lower() if isinstance(value, bool) else value
        raise ConfigError(f"{where}.{key}: {shown} contradicts {fixed.source}; leave it out, or change the other")


def _put(into: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        into = into.setdefault(name, {})
    into[last] = value


def _show(offload: OffloadConfig) -> str:
    set_fields = [f"{name}: {value}" for name, value in offload.model_dump().items() if value not in ("none", None)]
    return f"offload {{{', '.join(set_fields)}}}" if set_fields else "offload: none"


def _even(count: int) -> int:
    """DeepSpeed's flat buffers have even lengths."""
    return count + count % 2
