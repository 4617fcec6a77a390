"""The classes that a checkpoint's own head was trained on, and their order."""

import re
from collections.abc import Sequence

from transformers.configuration_utils import PreTrainedConfig

from fedray.config import ModelConfig
from fedray.models.checkpoints.stored import stored_configuration


def class_order(model: ModelConfig, names: Sequence[str]) -> tuple[str, ...]:
    """Return class names in the order in which the checkpoint's own head has them, or as they come where it has others.

    Names are equal apart from case and surrounding blanks, and transformers' `LABEL_3` is the class 3.

    Raises:
        ConfigError: the checkpoint's configuration cannot be read.
    """
    own = None if model.path == "random" else own_classes(stored_configuration(model))
    if own is None or not same_classes(own, names):
        return tuple(names)
    by_key = {_key(name): name for name in names}
    return tuple(by_key[_key(name)] for name in own)


def own_classes(stored: PreTrainedConfig) -> tuple[str, ...] | None:
    """Return the classes that a checkpoint names, in the order of its outputs; None where its head has none: one that
    was trained on numbers, or with several answers to a text."""
    indices = {int(index): str(name) for name, index in (stored.label2id or {}).items()}
    if sorted(indices) != list(range(len(indices))) or len(indices) != stored.num_labels:
        indices = {int(index): str(name) for index, name in stored.id2label.items()}
    names = tuple(name for _, name in sorted(indices.items()))
    several = stored.problem_type in ("regression", "multi_label_classification")
    return None if several or len(names) < 2 else names


def same_classes(own: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether two lists name the same classes, in any order (see `class_order`)."""
    keys, others = {_key(name) for name in own}, {_key(name) for name in names}
    return keys == others and len(keys) == len(own) == len(names)


def has_own_head(stored: PreTrainedConfig) -> bool:
    """Return whether a checkpoint says that it is a classifier; one that says nothing is one if it names classes."""
    if stored.architectures:
        return any(str(name).endswith("ForSequenceClassification") for name in stored.architectures)
    return not all(re.fullmatch(r"LABEL_\d+", str(name)) for name in stored.id2label.values())


def _key(name: str) -> str:
    plain = name.strip().casefold()
    default = re.fullmatch(r"label_(\d+)", plain)
    return str(int(default[1])) if default else plain
