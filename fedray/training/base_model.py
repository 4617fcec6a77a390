"""The frozen base model, in a tier's precision and on its device."""

import copy
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.heads import float_head
from fedray.config import Config, TierConfig
from fedray.errors import ConfigError
from fedray.models.attention import train_short_in_float32
from fedray.models.backbone import checkpoint_activations, load_backbone
from fedray.models.load_options import LoadOptions
from fedray.training.metering import CUDA_CONTEXT


def load_base_model(
    config: Config, architecture: PretrainedConfig, tier_name: str, tier: TierConfig, device: str, share: bool = False
) -> PreTrainedModel:
    """Return the frozen base model with its weights, as the tier's devices hold it.

    Args:
        architecture: from `fedray.models.architecture.architecture`.
        tier_name: for messages.
        device: cuda or cpu, where the tier computes.
        share: see `load_backbone`.

    Raises:
        ConfigError: float16 is configured without a GPU, the weights cannot be loaded, or the model does not support
            activation checkpointing.
    """
    held = held_architecture(architecture, tier)
    section = config.model.model_copy(update={"dtype": tier.dtype(config.model.dtype)})
    if section.dtype == "float16" and device == "cpu":
        raise ConfigError(f"tier {tier_name!r}: float16 needs a GPU; on a CPU use bfloat16 or float32")
    place = "cpu" if tier.engine.weights_on_host else device
    model = load_backbone(section, held, config.task, config.seed, place, config.data.cache_dir, share)
    return as_held(model, tier, device)


def held_once(config: Config, tier: TierConfig, frozen: int, adapter: Adapter) -> int:
    """Return the bytes of the base model that actors on parts of one GPU hold once; 0 if each has its own.

    Another process holds them (`fedray.models.holder`), which takes a CUDA context: a smaller base model is not worth
    it.

    Args:
        frozen: bytes of the base model that do not train.
        adapter: attached to it. Where it trains parameters of the base model, nothing is shared, nor in silos.
    """
    alone = tier.engine.weights_on_host or tier.workers > 1 or adapter.base_group() is not None
    allowed = config.clients.share_base and not alone
    return frozen if allowed and frozen >= CUDA_CONTEXT else 0


def held_architecture(architecture: PretrainedConfig, tier: TierConfig) -> PretrainedConfig:
    """Return the architecture with the number type in which the tier's devices hold the base weights, and with how
    they are quantised."""
    held = copy.deepcopy(architecture)
    if tier.quantised:
        replace(LoadOptions.of(held), quantised=tier.quantised).store(held)
    elif tier.precision is not None:
        held.dtype = getattr(torch, tier.precision)
    return held


def as_held(model: PreTrainedModel, tier: TierConfig, device: str) -> PreTrainedModel:
    """Change the base model in place to what the tier's devices compute with, and return it.

    Args:
        device: cuda or cpu, where the tier computes.

    Raises:
        ConfigError: the model does not support activation checkpointing.
    """
    float_head(model)
    if device == "cpu":
        train_short_in_float32(model)
    if tier.activation_checkpointing:
        checkpoint_activations(model)
    return model


def resolve_device(config: Config, tier: TierConfig) -> str:
    """Return cuda or cpu; `auto` means cuda if this process has a GPU and the tier may use one."""
    if config.device != "auto":
        return config.device
    return "cuda" if tier.num_gpus != 0 and torch.cuda.is_available() else "cpu"
