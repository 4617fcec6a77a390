"""The base model below an exported adapter: where others load it from, and the model itself without its adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedray.adapters.adapter import Adapter
from fedray.adapters.heads import head_modules
from fedray.adapters.portable import SingleLora
from fedray.config import ModelConfig
from fedray.errors import ConfigError, choices
from fedray.models.checkpoints.files import absent_weights
from fedray.models.load_options import LoadOptions
from fedray.models.on_base import OnBase
from fedray.models.paths import gguf_options, resolve_path

FOLDER = "base"
"""Folder with the base model's configuration and tokenizer, and with its weights where nothing else has them."""


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        where: folder or hub id of its weights; None: they are in the exported folder.
        absent: parameters below the head that `where` lacks, so that loading it draws them anew.
        stock: whether transformers has its class; otherwise a head of fedray's own reads the pooled hidden states.
    """

    where: str | None
    absent: tuple[str, ...]
    stock: bool


def base_of(model: PreTrainedModel, section: ModelConfig, whole: bool) -> Base:
    """Return the base of a model without its adapter.

    Args:
        section: the run's section `model`.
        whole: whether the folder gets all weights anyway.

    Raises:
        ConfigError: transformers alone cannot load these weights as fedray does.
    """
    options = LoadOptions.of(model.config)
    if options.part_of:
        raise ConfigError(
            f"model: the language part of {options.part_of} is a model that fedray builds itself; transformers has no "
            "class that would load what is exported"
        )
    if options.untied and not whole:
        raise ConfigError(
            f"model: {section.path!r} holds values of their own for {choices(options.untied, 5)}, which transformers "
            "ties to others when it loads them, so the exported adapter would compute something else; export with "
            "--merge"
        )
    stock = not isinstance(model, OnBase)
    if whole or section.path == "random" or gguf_options(section.path):
        return Base(None, (), stock)
    head = {name for name, _ in named_head(model)}
    absent = [name for name in absent_weights(section, model) if name not in head]
    return Base(resolve_path(section.path), tuple(absent), stock)


def named_head(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters of the task head by name."""
    return [
        (f"{name}.{inner}", parameter.detach())
        for name, module in head_modules(model).items()
        for inner, parameter in module.named_parameters()
    ]


def write_base(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    """Write what the exported folder has of the base model, which has no adapter any more."""
    inner: Any = model if base.stock else model.base_model
    if base.where is None:
        inner.save_pretrained(folder)
    else:
        inner.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def without_adapter(adapter: Adapter) -> PreTrainedModel:
    """Take the adapter out of its model, in place, and return the model."""
    model: Any = adapter.model
    for path, layer in adapter.targets.items():
        model.set_submodule(path, layer.get_base_layer())
    base = getattr(model, "base_model", model)
    for owner, name in ((base, "reft"), (model, "lora_gate")):
        if hasattr(owner, name):
            delattr(owner, name)
    model._forward_hooks.clear()
    model._forward_pre_hooks.clear()
    found: PreTrainedModel = model
    return found


def merge(adapter: Adapter, lora: SingleLora) -> None:
    """Add a LoRA to the weights of its layers, W0 + (alpha / r) · B A, in float64, rounded once."""
    for path, layer in adapter.targets.items():
        base = layer.get_base_layer()
        weight = cast(nn.Parameter, base.weight)
        factors = lora.factors[path]
        delta = torch.from_numpy(lora.scale * (factors.B.astype(np.float64) @ factors.A.astype(np.float64)))
        delta = delta.T if isinstance(base, Conv1D) else delta
        weight.data = (weight.double() + delta.to(weight.device)).to(weight.dtype)
