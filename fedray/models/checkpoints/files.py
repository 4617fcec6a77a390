"""What lies in a checkpoint's folder beside its configuration: pooling layers, and the weights by name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from fedray.config import ModelConfig, Pooling
from fedray.errors import ConfigError
from fedray.models.paths import resolve_path

POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""What sentence-transformers calls the ways of pooling that `model.pooling` has."""
OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Fields of a pooling layer's configuration before `pooling_mode`, one truth value each."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files with weights or with their list, in the order in which transformers looks for them."""


@dataclass(frozen=True)
class SentenceEncoder:
    """How sentence-transformers makes one vector of a text.

    Attributes:
        pooling: of the tokens' last hidden states.
        normalised: whether the vector is scaled to length 1.
        left_out: layers that follow the pooling and are not read, such as a projection.
    """

    pooling: Pooling
    normalised: bool
    left_out: tuple[str, ...]


def stored_file(model: ModelConfig, name: str) -> Path | None:
    """Return a file of the checkpoint, downloaded if need be; None if it has no such file."""
    found = cached_file(
        resolve_path(model.path),
        name,
        revision=model.revision or "main",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def sentence_encoder(model: ModelConfig) -> SentenceEncoder | None:
    """Return how the checkpoint's own pooling layer reads a text; None if it has none (`modules.json`, `1_Pooling`).

    Raises:
        ConfigError: the layer pools in a way that `model.pooling` does not have.
    """
    listed = stored_file(model, "modules.json")
    if listed is None:
        return None
    modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in _json(listed)]
    folder = next((path for kind, path in modules if kind == "Pooling"), None)
    file = None if folder is None else stored_file(model, f"{folder}/config.json")
    if file is None:
        return None
    fields = _json(file)
    modes = fields.get("pooling_mode") or [mode for name, mode in OLD_POOLINGS.items() if fields.get(name)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ConfigError(
            f"model.pooling: {model.path} pools its tokens by {' and '.join(modes)}, which fedray does not; choose how "
            "it is read: mean, cls, last, or head (the classifier that transformers has for this architecture)"
        )
    kinds = [kind for kind, _ in modules]
    left_out = (kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize"))
    return SentenceEncoder(POOLINGS[modes[0]], "Normalize" in kinds, tuple(left_out))


def untied_weights(model: ModelConfig, built: PreTrainedModel) -> tuple[str, ...]:
    """Return the parameters that the architecture ties to others and that have other values in the checkpoint.

    transformers ties only what a checkpoint lacks, or holds twice with equal values. Only the tied tensors are read,
    and nothing where the architecture ties nothing.

    Args:
        built: the model, on the meta device.
    """
    pairs = dict(built.all_tied_weights_keys)
    if not pairs:
        return ()
    held = _StoredWeights(model, built, {*pairs, *pairs.values()})
    untied = []
    for target, source in pairs.items():
        if target in held.keys and source in held.keys:
            if not torch.equal(held.read(target), held.read(source)):
                untied.append(target)
        elif target in held.keys:  # what else is tied to the source is compared with what the source becomes
            held.keys[source] = held.keys[target]
    return tuple(untied)


def absent_weights(model: ModelConfig, built: PreTrainedModel) -> tuple[str, ...]:
    """Return the parameters that the checkpoint lacks, except those that are tied to others: loading the checkpoint
    draws them at random.

    Args:
        built: the model, on any device.
    """
    names = {name for name, _ in built.named_parameters()} - set(built.all_tied_weights_keys)
    return tuple(sorted(names - set(_StoredWeights(model, built, names).keys)))


class _StoredWeights:
    """Some of a checkpoint's weights, by the names that its model gives them.

    Attributes:
        keys: the name in the checkpoint by the name in the model.
    """

    def __init__(self, model: ModelConfig, built: PreTrainedModel, wanted: set[str]):
        self._model = model
        self._files, self._read = _files_by_key(model), dict[str, Tensor]()
        transforms = get_model_conversion_mapping(built)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        expected, prefix = built.state_dict(), built.base_model_prefix
        self.keys = {
            name: key
            for key in self._files
            if (name := rename_source_key(key, renamings, converters, prefix, expected)[0]) in wanted
        }

    def read(self, name: str) -> Tensor:
        """Return a weight by its name in the model."""
        key = self.keys[name]
        if key not in self._read:
            file = stored_file(self._model, self._files[key])
            if file is None:
                raise ConfigError(f"model.path: {self._model.path!r} lacks its file {self._files[key]}")
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    self._read[key] = opened.get_tensor(key)
            else:
                state = load_state_dict(file)
                self._read |= {other: state[other] for other in self.keys.values() if other in state}
        return self._read[key]


def _files_by_key(model: ModelConfig) -> dict[str, str]:
    """Return the checkpoint's file of each of its weights; empty if it has none that is known here."""
    for name in WEIGHTS:
        file = stored_file(model, name)
        if file is None:
            continue
        if name.endswith(".json"):
            return dict(_json(file)["weight_map"])
        if name.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), name)
        return dict.fromkeys(load_state_dict(file, map_location="meta"), name)
    return {}


def _json(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
