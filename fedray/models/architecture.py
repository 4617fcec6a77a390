"""The configuration of a model, stored or drawn, with what the task and the tokenizer decide."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.configuration_utils import PreTrainedConfig

from fedray.config import ModelConfig
from fedray.errors import ConfigError, choices, nearest, one_line
from fedray.models.build import build_meta, has_classifier, is_decoder
from fedray.models.checkpoints.classes import has_own_head, own_classes, same_classes
from fedray.models.checkpoints.files import sentence_encoder, untied_weights
from fedray.models.checkpoints.stored import stored_configuration, text_part, warn_of_adapter, warn_of_quantisation
from fedray.models.load_options import ATTRIBUTE, LoadOptions
from fedray.models.paths import gguf_options
from fedray.types import Task

ROPE_FIELDS = ("rope_theta", "rope_scaling")
"""Older names that transformers still reads where a configuration has `rope_parameters`."""


log = logging.getLogger(__name__)


def architecture(
    model: ModelConfig,
    task: Task,
    num_labels: int,
    vocab_size: int | None,
    pad_token_id: int | None,
    label_names: Sequence[str] = (),
) -> PreTrainedConfig:
    """Return the model's configuration for the task, with every dropout probability 0: the base is frozen.

    What follows from the checkpoint's other files is in it, too (`LoadOptions`), and warnings say what a user should
    know.

    Args:
        num_labels: number of classes; ignored for regression (1) and causal_lm.
        vocab_size: number of tokens of the tokenizer. A `random` model takes it over unless `model.config` has its
            own; any model must have at least as many.
        pad_token_id: the tokenizer's.
        label_names: of the classes, in the order of the model's outputs; none: nothing is said about a checkpoint's own
            classes.

    Raises:
        ConfigError: the configuration cannot be found or read, a field of `model.config` is unknown or of a wrong
            type, the tokenizer has more tokens than the model, or the task head cannot be built as configured.
    """
    drawn = model.path == "random"
    arch = _drawn_architecture(model, vocab_size) if drawn else _stored_architecture(model)
    if vocab_size is not None and vocab_size > getattr(arch, "vocab_size", vocab_size):  # CANINE hashes characters
        raise ConfigError(
            f"model.tokenizer: has {vocab_size} tokens, but the model {model.path!r} only {arch.vocab_size}; choose "
            "the model's own tokenizer, or a model with a larger vocabulary"
        )
    for name, value in arch.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(arch, name, 0.0)
    if pad_token_id is not None:
        arch.pad_token_id = pad_token_id
    arch.dtype = getattr(torch, model.dtype)
    if task == "causal_lm":
        _read_forwards(model, arch)
    else:
        _prepare_head(model, arch, task, num_labels, label_names)
    if gguf_options(model.path):
        warn_of_quantisation(model)
    elif not drawn:
        warn_of_adapter(model)
        untied = untied_weights(model, build_meta(arch, task))
        replace(LoadOptions.of(arch), untied=untied).store(arch)
    return arch


def _read_forwards(model: ModelConfig, arch: PreTrainedConfig) -> None:
    """Give an encoder that can be a decoder its causal mask; other families' decoders have one anyway."""
    if arch.is_encoder_decoder or getattr(arch, "is_decoder", True):
        return
    arch.is_decoder = True
    if model.path != "random" and type(arch) in AutoModelForMaskedLM._model_mapping:
        log.warning(
            "%s: an encoder (%s), which was trained to read both ways, reads only earlier tokens as a language model",
            model.path,
            arch.model_type,
        )


def _prepare_head(
    model: ModelConfig, arch: PreTrainedConfig, task: Task, num_labels: int, label_names: Sequence[str]
) -> None:
    """Put into the configuration how the task head reads a text, and what it tells apart."""
    pooled = _pooled(model, arch)
    new_head = False
    if model.path != "random" and has_own_head(arch) and (label_names or task == "regression"):
        new_head = _misfit(model, arch, task, label_names, pooled)
    replace(LoadOptions.of(arch), pooling=pooled.pooling, normalised=pooled.normalised, new_head=new_head).store(arch)
    arch.problem_type = "regression" if task == "regression" else "single_label_classification"
    names = ["LABEL_0"] if task == "regression" else label_names or [f"LABEL_{i}" for i in range(num_labels)]
    arch.id2label = dict(enumerate(names))
    arch.label2id = {name: index for index, name in enumerate(names)}
    if pooled.pooling != "head" and hasattr(arch, "use_cache"):
        arch.use_cache = False


def _pooled(model: ModelConfig, arch: PreTrainedConfig) -> LoadOptions:
    """Return how the head reads a text: as configured, as the sentence encoder's folder says, or as the family does.

    Raises:
        ConfigError: there is no classifier of the family's own, or the folder asks for what there is not.
    """
    own = has_classifier(arch)
    if model.pooling == "head" and not own:
        raise ConfigError(
            f"model.pooling: transformers has no classifier for {arch.model_type}; choose mean, cls or last"
        )
    if model.pooling is not None:
        return LoadOptions(pooling=model.pooling)
    encoder = None if model.path == "random" or gguf_options(model.path) else sentence_encoder(model)
    if encoder is not None:
        if encoder.left_out:
            log.warning(
                "%s: the task head reads the pooled tokens; the sentence encoder's further layers are left out: %s",
                model.path,
                choices(encoder.left_out),
            )
        return LoadOptions(pooling=encoder.pooling, normalised=encoder.normalised)
    if own:
        return LoadOptions()
    return LoadOptions(pooling="last" if is_decoder(arch) else "mean")


def _misfit(
    model: ModelConfig, arch: PreTrainedConfig, task: Task, label_names: Sequence[str], pooled: LoadOptions
) -> bool:
    """Return whether the checkpoint's own head was trained on something else than it is now to learn, and say so."""
    own = own_classes(arch)
    trained_on = f"the classes {choices(own)}" if own else f"{arch.num_labels} numbers or independent labels"
    if pooled.pooling != "head":
        reason = f"another vector of a text than model.pooling {pooled.pooling} makes"
    elif task == "regression":
        if arch.num_labels == 1:
            return False
        reason = f"{trained_on}, and the task is regression"
    elif own is None or not same_classes(own, label_names):
        reason = f"{trained_on}; the data's classes are {choices(label_names)}"
    else:
        return False
    log.warning("%s: its task head was trained on %s; a new head is drawn", model.path, reason)
    return True


def _drawn_architecture(model: ModelConfig, vocab_size: int | None) -> PreTrainedConfig:
    fields = {"vocab_size": vocab_size, **model.config} if vocab_size is not None else dict(model.config)
    model_type = fields.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        known = sorted(transformers.CONFIG_MAPPING.keys())
        raise ConfigError(f"model.config.model_type: transformers knows no {model_type!r}{nearest(model_type, known)}")
    plain = AutoConfig.for_model(model_type)
    if (text := text_part(plain)) is not None:
        raise ConfigError(
            f"model.config.model_type: {model_type} also reads images or sound; for its language part name "
            f"{text.model_type}"
        )
    _check_fields(fields, plain)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # validators of every architecture raise their own kinds
        raise ConfigError(f"model.config: {one_line(error)}") from error


def _stored_architecture(model: ModelConfig) -> PreTrainedConfig:
    arch = stored_configuration(model)
    _check_fields(model.config, arch)
    for name, value in model.config.items():
        try:
            setattr(arch, name, value)
        except Exception as error:
            raise ConfigError(f"model.config.{name}: {one_line(error)}") from error
    return arch


def _check_fields(fields: Iterable[str], arch: PreTrainedConfig) -> None:
    known = {*arch.to_dict(), *arch.attribute_map} - {"model_type", "transformers_version", "dtype", ATTRIBUTE}
    if "rope_parameters" in known:
        known |= set(ROPE_FIELDS)
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"model.config.{name}: {arch.model_type} has no such field{nearest(name, known)}; it has "
                f"{choices(sorted(known), limit=60)}"
            )
