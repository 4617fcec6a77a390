"""Builds a model from its configuration, without weights of a checkpoint: which class it has, and what it ties."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.configuration_utils import PreTrainedConfig

from fedray.errors import ConfigError, one_line
from fedray.models.language import LanguageModel
from fedray.models.load_options import LoadOptions
from fedray.models.on_base import OnBase, class_on_base
from fedray.models.pooling import PooledClassifier
from fedray.models.quantised import quantise_layers
from fedray.types import Task


def build(arch: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """Return the model with newly drawn weights, on the current device.

    Raises:
        ConfigError: it cannot be built for this task.
    """
    try:
        # The configuration is kept by the model and changed in places.
        own, found = copy.deepcopy(arch), model_class(arch, task)
        built: PreTrainedModel = (
            found._from_config(own)
            if issubclass(found, OnBase)
            else found.from_config(own, trust_remote_code=_trusted(arch))
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, AttributeError) as error:
        whole = LoadOptions.of(arch).part_of
        part = f", the language part of {whole}," if whole else ""
        raise ConfigError(
            f"model: {arch.model_type}{part} cannot be built for the task {task}: {one_line(error)}"
        ) from error
    return built


def build_meta(arch: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """Return the model on the meta device, with the ties that its checkpoint has, and quantised layers where the
    configuration says so.

    Raises:
        ConfigError: as `build` and `quantise_layers`.
    """
    with torch.device("meta"):
        built = build(arch, task)
    options = LoadOptions.of(arch)
    for name in options.untied:
        path, _, leaf = name.rpartition(".")
        module = built.get_submodule(path)
        setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf))))
        built.all_tied_weights_keys.pop(name, None)
    if options.quantised:
        quantise_layers(built, options.quantised)
    return built


def model_class(arch: PreTrainedConfig, task: Task) -> Any:
    """Return the class with `from_pretrained` that loads the model for the task."""
    options = LoadOptions.of(arch)
    if task == "causal_lm" and (_continues_text(arch) or not _describes_images(options)):
        return AutoModelForCausalLM
    if task != "causal_lm" and options.pooling == "head":
        return AutoModelForSequenceClassification
    with torch.device("meta"):
        base: Any = type(AutoModel.from_config(copy.deepcopy(arch), trust_remote_code=_trusted(arch)))
    return class_on_base(LanguageModel if task == "causal_lm" else PooledClassifier, base)


def has_classifier(arch: PreTrainedConfig) -> bool:
    """Return whether transformers, or the hub's code, has a classifier for the architecture."""
    of_hub = "AutoModelForSequenceClassification" in (getattr(arch, "auto_map", None) or {})
    return of_hub or type(arch) in AutoModelForSequenceClassification._model_mapping


def is_decoder(arch: PreTrainedConfig) -> bool:
    """Return whether a token's last hidden state depends on earlier tokens only, so that the last one has read all."""
    continues = _continues_text(arch) and getattr(arch, "is_decoder", True)
    return bool(continues or arch.is_encoder_decoder or _describes_images(LoadOptions.of(arch)))


def _continues_text(arch: PreTrainedConfig) -> bool:
    return type(arch) in AutoModelForCausalLM._model_mapping


def _describes_images(options: LoadOptions) -> bool:
    """Return whether the model is the language part of one that answers in text, so that it can have an output layer;
    CLIP's, for example, cannot."""
    known = options.part_of in CONFIG_MAPPING
    return known and CONFIG_MAPPING[options.part_of] in AutoModelForImageTextToText._model_mapping


def _trusted(arch: PreTrainedConfig) -> bool:
    """Return whether code of the hub may run: only if the configuration itself was allowed to come from such code."""
    return type(arch).__module__.startswith("transformers_modules")
