"""The node's file of base weights: every process maps it copy-on-write instead of holding a copy.

The tensors adopted from it are the mapping itself. Pages are shared until a process writes to them, and a write stays
in the process that made it (safetensors maps files privately; a test with two processes proves it).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedray.errors import ConfigError, cannot_cache, choices
from fedray.models.cache import replacing

FORMAT = 3
"""Part of the file's name; raise it when what is written changes."""

BUFFER = "buffer:"
"""Prefix of the buffers that a state dict leaves out (rotary frequencies, position ids): a model built on the meta
device has none of their values."""


def write(file: Path, model: PreTrainedModel, missing_head: Sequence[str], left_padding: bool) -> None:
    """Write the weights, each tied one once, and all buffers; the file appears complete or not at all.

    Args:
        missing_head: parameters of the task head that no checkpoint had; kept in the file's metadata.
        left_padding: whether the model reads padding on the left (`fedray.models.checks`); kept there, too.

    Raises:
        ConfigError: the folder cannot hold the file.
    """
    state = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    tensors |= {BUFFER + name: value.contiguous() for name, value in model.named_buffers() if name not in state}
    facts = {"missing_head": list(missing_head), "tied": tied, "left_padding": left_padding}
    metadata = {name: json.dumps(fact) for name, fact in facts.items()}
    with replacing(file) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # its own kind for a full disk
            raise cannot_cache(file.parent, error) from None


def adopt(
    model: PreTrainedModel, file: Path, shared: Mapping[str, Tensor] | None = None
) -> tuple[tuple[str, ...], bool]:
    """Give a model on the meta device the file's mapped tensors (no copies), its buffers and its ties.

    Args:
        shared: the file's tensors where another process holds them (`fedray.models.holder`); None: map the file.

    Returns:
        `missing_head` and `left_padding`, as they were written.

    Raises:
        ConfigError: the file is damaged, or does not hold every value of the model.
    """
    try:
        tensors = load_file(file) if shared is None else shared
        with safe_open(file, framework="pt") as opened:
            facts = {name: json.loads(fact) for name, fact in opened.metadata().items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{file}: the node's copy of the base model is damaged ({error}); delete this file"
        ) from error
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(BUFFER)}
    model.load_state_dict(state, strict=False, assign=True)
    for name in tensors.keys() - state.keys():
        path, _, buffer = name.removeprefix(BUFFER).rpartition(".")
        model.get_submodule(path).register_buffer(buffer, tensors[name], persistent=False)
    for name, source in facts["tied"].items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter_or_buffer(source))
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if lost:
        raise ConfigError(
            f"model: {type(model).__name__} cannot be shared between processes: no values for {choices(lost)}"
        )
    return tuple(facts["missing_head"]), bool(facts["left_padding"])
