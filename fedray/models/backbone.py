"""The frozen base model: its shape without weights, and its weights shared by all actors of a node.

The weights are in one safetensors file per node, quantised where a tier asks for that, and written once under a lock.
On a CPU, every process maps it copy-on-write, so pages are shared until a process writes to them, and a write stays in
the process that made it. On a GPU, processes may share one read-only copy (`fedray.models.holder`).
"""

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import nn
from transformers import GgufConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from fedray.config import ModelConfig
from fedray.errors import ConfigError, cannot_cache, choices
from fedray.models.build import build, build_meta, model_class
from fedray.models.checks import READS_LEFT_PADDING, check_model
from fedray.models.holder import CannotShare, Shared, shared_tensors
from fedray.models.load_options import LoadOptions
from fedray.models.node_file import FORMAT, adopt, write
from fedray.models.paths import gguf_options, remedy, resolve_path
from fedray.models.quantised import quantise_layers
from fedray.randomness import keyed_seed
from fedray.types import Task

NO_ADAPTER = "no-adapter"
"""Folder in which transformers looks for a peft adapter, whose layers it would otherwise put into the model."""

OF_A_PART = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.(?!model\.|lm_head\.)": "model.",
}
"""How the weights of a language part are called in the checkpoint of the whole model, and in its own."""

MISSING_HEAD = "fedray_missing_head"
"""Attribute of a loaded model, read by `missing_head`."""

HELD = "fedray_held"
"""Attribute of a loaded model: the weights that another process holds for it, and the connection to it."""

log = logging.getLogger(__name__)


def meta_backbone(arch: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """Return the model on the meta device: shapes without weights, for counting and for layouts."""
    return _frozen(build_meta(arch, task))


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens a model with learned positions can read; None where positions are computed (RoPE, ALiBi).

    RoBERTa's positions begin behind the padding token's, so that many of them are never used.
    """
    learned = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name.rpartition(".")[2] or name.endswith(".wpe"))
    ]
    declared = getattr(model.config, "max_position_embeddings", None)
    return min([*learned, *([declared] if declared else [])]) if learned else None


def load_backbone(
    model: ModelConfig,
    arch: PreTrainedConfig,
    task: Task,
    seed: int,
    device: str | torch.device,
    cache_dir: str | Path,
    share: bool = False,
) -> PreTrainedModel:
    """Return the frozen model in evaluation mode, its weights mapped from this node's file (made if need be).

    Args:
        arch: from `architecture`.
        seed: draws the weights of a `random` model.
        device: where the weights are copied, once; on the cpu they stay mapped.
        cache_dir: folder for the node's files; one per model, revision, architecture and type.
        share: hold the weights once for all processes on the device (`fedray.models.holder`). Then nothing may write to
            them but to the task head, which is a copy. Where they cannot be shared, they are copied, with a warning.

    Raises:
        ConfigError: the weights cannot be found, read or reached, or do not fit the architecture, or the model reads
            what it must not (`fedray.models.checks`).
    """
    file = Path(cache_dir).expanduser() / "backbones" / f"{_digest(model, arch, task, seed)}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            with FileLock(file.with_suffix(".lock")):
                if not file.exists():
                    weights, new = _first_weights(model, arch, task, seed)
                    if quantised := LoadOptions.of(arch).quantised:
                        quantise_layers(weights, quantised)
                    left_padding = check_model(model.path, _frozen(weights), task, max_positions(weights))
                    write(file, weights, new, left_padding)
    except OSError as error:
        raise cannot_cache(file.parent, error) from None
    backbone, where = meta_backbone(arch, task), torch.device(device)
    shared = _shared(file, where) if share else None
    missing, left_padding = adopt(backbone, file, shared.tensors if shared else None)
    setattr(backbone, MISSING_HEAD, missing)
    setattr(backbone, READS_LEFT_PADDING, left_padding)
    if shared is not None:
        own = _head_names(backbone, task)
        for name, parameter in backbone.named_parameters():
            if name in own:
                parameter.data = parameter.data.clone()
        setattr(backbone, HELD, shared)
    placed: PreTrainedModel = _frozen(backbone).to(where)
    return placed


def held_elsewhere(model: nn.Module) -> int:
    """Return how many bytes of a loaded model's weights another process holds for it."""
    if getattr(model, HELD, None) is None:
        return 0
    own = {tensor.data_ptr() for tensor in getattr(model, HELD).tensors.values()}
    return sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.data_ptr() in own)


def _shared(file: Path, device: torch.device) -> Shared | None:
    try:
        return shared_tensors(file, device)
    except CannotShare as error:
        log.warning("every actor on this GPU holds a base model of its own, since they cannot share one: %s", error)
        return None


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Make the model keep only its blocks' inputs while training, and compute the rest again in the backward pass.

    Raises:
        ConfigError: transformers cannot do that for this architecture.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"activation_checkpointing: {type(model).__name__} does not support it; leave it out")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def missing_head(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the task head's parameters that no checkpoint had: they are to be drawn."""
    return tuple(getattr(model, MISSING_HEAD, ()))


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # probabilities that are not in the configuration
    model.requires_grad_(False)
    model.train(False)
    return model


def _digest(model: ModelConfig, arch: PreTrainedConfig, task: Task, seed: int) -> str:
    """Name everything that the weights follow from; of a local folder also its files' sizes and times."""
    drawn = model.path == "random"
    where = Path(model.path if drawn else resolve_path(model.path))
    files = [] if drawn or not where.is_dir() else sorted(entry for entry in where.iterdir() if entry.is_file())
    facts = {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "path": str(where),
        "revision": model.revision,
        "commit": getattr(arch, "_commit_hash", None),
        "files": [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in files],
        "gguf": gguf_options(model.path),
        "arch": {**arch.to_dict(), "id2label": arch.num_labels, "label2id": None},  # names do not change weights
        "dtype": model.dtype,
        "task": task,
        "seed": seed if drawn else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _first_weights(
    model: ModelConfig, arch: PreTrainedConfig, task: Task, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model with private weights, and the names of the head's parameters that are newly made.

    What a checkpoint lacks is drawn by transformers: from a fixed seed, and without touching the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed if model.path == "random" else 0, "backbone"))
        if model.path == "random":
            drawn = build(arch, task)
            return drawn, [name for name in dict(drawn.named_parameters()) if name in _head_names(drawn, task)]
        loaded, missing, mismatched = _pretrained(model, arch, task)
    head = _head_names(loaded, task)
    _check_shapes(model, loaded, mismatched - head)
    _check_missing(model, loaded, missing - head)
    new = _names_of_classes(arch, task) if LoadOptions.of(arch).new_head else set()
    return loaded, sorted((missing | mismatched | new) & head)


def _pretrained(model: ModelConfig, arch: PreTrainedConfig, task: Task) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Return the checkpoint's model, the parameters that it lacks, and those that have another shape there."""
    options: dict[str, Any] = {"key_mapping": OF_A_PART} if LoadOptions.of(arch).part_of else {}
    if of_gguf := gguf_options(model.path):
        options |= {**of_gguf, "quantization_config": GgufConfig(dequantize=True)}
    try:
        loaded, info = model_class(arch, task).from_pretrained(
            resolve_path(model.path),
            config=copy.deepcopy(arch),
            dtype=arch.dtype,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            ignore_mismatched_sizes=True,  # a head with another number of labels; the base is checked by the caller
            output_loading_info=True,
            adapter_kwargs={"subfolder": NO_ADAPTER},
            **options,
        )
    except Exception as error:  # transformers, huggingface_hub, safetensors and torch each raise their own kinds
        raise ConfigError(f"model.path: no weights could be loaded from {model.path!r}: {remedy(error)}") from error
    return loaded, set(info["missing_keys"]), {key[0] for key in info["mismatched_keys"]}


def _names_of_classes(arch: PreTrainedConfig, task: Task) -> set[str]:
    """Return the parameters whose shape depends on the number of classes."""
    wider = copy.deepcopy(arch)
    wider.num_labels = arch.num_labels + 1
    shapes = {name: parameter.shape for name, parameter in build_meta(arch, task).named_parameters()}
    return {name for name, parameter in build_meta(wider, task).named_parameters() if parameter.shape != shapes[name]}


def _check_shapes(model: ModelConfig, loaded: PreTrainedModel, mismatched: set[str]) -> None:
    """A part of the base whose shape differs would be drawn anew without a word."""
    if mismatched:
        name = min(mismatched)
        shape = tuple(loaded.get_parameter(name).shape)
        names = choices(sorted(mismatched), limit=5)
        raise ConfigError(
            f"model.path: {model.path!r} has weights of another shape than its configuration says: {names} "
            f"({name} should be {shape}); correct config.json, or override it in model.config (after tokens were "
            "added, vocab_size is the number of rows of the embeddings)"
        )


def _check_missing(model: ModelConfig, loaded: PreTrainedModel, missing: set[str]) -> None:
    """A checkpoint may lack an unused part (BERT's pooler); a base that is mostly random is not pretrained."""
    if not missing:
        return
    sizes = {name: parameter.numel() for name, parameter in loaded.named_parameters()}
    share = sum(sizes.get(name, 0) for name in missing) / sum(sizes.values())
    names = choices(sorted(missing), limit=5)
    if share > 0.1:
        raise ConfigError(
            f"model.path: {model.path!r} has no weights of the expected shape for {share:.0%} of the base model "
            f"({names}); name a checkpoint of this architecture, and check the overrides in model.config"
        )
    log.warning("%s has no weights for %s; they are drawn from a fixed seed and stay frozen", model.path, names)


def _head_names(model: PreTrainedModel, task: Task) -> set[str]:
    base = {id(parameter) for parameter in model.base_model.parameters()}
    named = () if task == "causal_lm" else model.named_parameters()
    return {name for name, parameter in named if id(parameter) not in base}
