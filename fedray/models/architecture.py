"""The configuration of a model, stored or drawn, with what the task and the tokenizer decide."""

from collections.abc import Iterable

import torch
import transformers
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from fedray.config import ModelConfig
from fedray.errors import ConfigError, choices, nearest
from fedray.models.paths import resolve_path
from fedray.types import Task

ROPE_FIELDS = ("rope_theta", "rope_scaling")
"""Older names that transformers still reads where a configuration has `rope_parameters`."""


def architecture(
    model: ModelConfig, task: Task, num_labels: int, vocab_size: int | None, pad_token_id: int | None
) -> PreTrainedConfig:
    """Return the model's configuration for the task, with every dropout probability 0: the base is frozen.

    Args:
        num_labels: number of classes; ignored for regression (1) and causal_lm.
        vocab_size: number of tokens of the tokenizer. A `random` model takes it over unless `model.config` has its
            own; any model must have at least as many.
        pad_token_id: the tokenizer's.

    Raises:
        ConfigError: the configuration cannot be found or read, a field of `model.config` is unknown or of a wrong
            type, or the tokenizer has more tokens than the model.
    """
    arch = _drawn_architecture(model, vocab_size) if model.path == "random" else _stored_architecture(model)
    if vocab_size is not None and vocab_size > arch.vocab_size:
        raise ConfigError(
            f"model.tokenizer: has {vocab_size} tokens, but the model {model.path!r} only {arch.vocab_size}; choose "
            "the model's own tokenizer, or a model with a larger vocabulary"
        )
    for name, value in arch.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(arch, name, 0.0)
    if pad_token_id is not None:
        arch.pad_token_id = pad_token_id
    if task != "causal_lm":
        arch.num_labels = 1 if task == "regression" else num_labels
        arch.problem_type = "regression" if task == "regression" else "single_label_classification"
    arch.dtype = getattr(torch, model.dtype)
    return arch


def _drawn_architecture(model: ModelConfig, vocab_size: int | None) -> PreTrainedConfig:
    fields = {"vocab_size": vocab_size, **model.config} if vocab_size is not None else dict(model.config)
    model_type = fields.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        known = sorted(transformers.CONFIG_MAPPING.keys())
        raise ConfigError(f"model.config.model_type: transformers knows no {model_type!r}{nearest(model_type, known)}")
    _check_fields(fields, AutoConfig.for_model(model_type))
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # validators of every architecture raise their own kinds
        raise ConfigError(f"model.config: {one_line(error)}") from error


def _stored_architecture(model: ModelConfig) -> PreTrainedConfig:
    try:
        arch: PreTrainedConfig = AutoConfig.from_pretrained(
            resolve_path(model.path), revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except ConfigError:
        raise
    except Exception as error:  # transformers, huggingface_hub and json each raise their own kinds
        raise ConfigError(f"model.path: no configuration could be read from {model.path!r}: {remedy(error)}") from error
    _check_fields(model.config, arch)
    for name, value in model.config.items():
        try:
            setattr(arch, name, value)
        except Exception as error:
            raise ConfigError(f"model.config.{name}: {one_line(error)}") from error
    return arch


def _check_fields(fields: Iterable[str], arch: PreTrainedConfig) -> None:
    known = {*arch.to_dict(), *arch.attribute_map} - {"model_type", "transformers_version", "dtype"}
    if "rope_parameters" in known:
        known |= set(ROPE_FIELDS)
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"model.config.{name}: {arch.model_type} has no such field{nearest(name, known)}; it has "
                f"{choices(sorted(known), limit=60)}"
            )


def one_line(error: Exception) -> str:
    """Return an error's text as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def remedy(error: Exception) -> str:
    """Return why a model could not be read, and what to do about it."""
    text = one_line(error)
    if "trust_remote_code" in text:
        return f"{text} (model.trust_remote_code: true runs its code; only for authors you know)"
    return (
        f"{text}. Name a local folder, `package:NAME`, or a hub id that this machine can reach (HF_HOME: where earlier "
        "downloads lie)"
    )
