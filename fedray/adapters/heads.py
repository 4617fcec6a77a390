"""The task head: what a classification or regression model has outside its base model.

BERT: `classifier`; RoBERTa: `classifier.dense` and `classifier.out_proj`; Llama, Qwen, GPT-NeoX: `score`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedray.adapters.group import Entry, Group
from fedray.adapters.layout import Slot
from fedray.errors import ConfigError
from fedray.types import Vector

LABEL_TEXT_SCALE = 10.0
"""`frozen_label_text`: a text whose features deviate from the labels' mean exactly as a label's own text does (on the
average over labels) gets this logit for that label."""


def is_meta(model: nn.Module) -> bool:
    """Return whether the model has no values, only shapes."""
    return next(model.parameters()).device.type == "meta"


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the task head by name; none for a language model, or a bare base model."""
    base = getattr(model, "base_model", model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if base is model or output is not None:
        return {}
    return {
        name: child
        for name, child in model.named_children()
        if child is not base and any(True for _ in child.parameters())
    }


def float_head(model: nn.Module) -> None:
    """Convert the task head to float32, whatever the type of the base model: it is trained, and small updates would be
    lost in half precision."""

    def widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)

    for module in head_modules(model).values():
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            module.float()
            module.register_forward_pre_hook(widen)


def head_group(model: nn.Module) -> Group | None:
    """Return the head as a group, one slot of part "tensor" per parameter, or None where the model has none."""
    entries = [
        Entry(Slot(f"{name}.{inner}", "tensor", tuple(parameter.shape)), parameter)
        for name, module in head_modules(model).items()
        for inner, parameter in module.named_parameters()
    ]
    return Group("head", entries) if entries else None


def label_text_head(model: nn.Module, tokenizer: Any, label_names: Sequence[str]) -> Vector:
    """Return the head whose last linear layer holds embeddings of the label names (`head: frozen_label_text`).

    Row c is LABEL_TEXT_SCALE · (f_c − f̄) / (‖f_c − f̄‖ · mean_j ‖f_j − f̄‖), with f_c the layer's own input when the
    model reads the name of label c (underscores and dashes as spaces) and f̄ their mean; its bias is zero.
    Call it on the backbone, before an adapter changes its features.

    Args:
        tokenizer: the model's, a transformers tokenizer.
        label_names: in the order of the classes.

    Raises:
        ConfigError: the last layer has not one row per label, or two labels have the same features.
    """
    head = head_group(model)
    linears = [m for module in head_modules(model).values() for m in module.modules() if isinstance(m, nn.Linear)]
    if head is None or not linears or linears[-1].out_features != len(label_names):
        raise ConfigError(
            f"head: frozen_label_text needs a last linear layer with one row per label; {type(model).__name__} has "
            f"{linears[-1].out_features if linears else 'no linear layer'} for {len(label_names)} labels"
        )
    texts = [name.replace("_", " ").replace("-", " ") for name in label_names]
    centred = _label_features(model, linears[-1], tokenizer, texts)
    centred = centred - centred.mean(0)
    norms = centred.norm(dim=1, keepdim=True)
    if norms.min() <= 1e-6 * max(1.0, float(norms.max())):
        raise ConfigError(f"head: frozen_label_text cannot tell the labels apart: {', '.join(label_names)}")
    rows = LABEL_TEXT_SCALE * centred / norms / norms.mean()
    last = {id(linears[-1].weight): rows, **({} if linears[-1].bias is None else {id(linears[-1].bias): None})}
    vector = head.read()
    views = head.layout.views(vector)
    for entry in head.entries:
        if id(entry.parameter) in last:
            value = last[id(entry.parameter)]
            views[entry.slot.name][...] = 0 if value is None else value.cpu().numpy()
    return vector


def _label_features(model: nn.Module, last: nn.Linear, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the inputs of the layer `last` when the model reads the texts, [labels, d], float32. Where the layer sees
    every token (decoders), the last one counts, as in the model's own pooling. One text at a time: no padding."""
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float()[0]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for text in texts:
                model(**tokenizer(text, return_tensors="pt").to(last.weight.device))
    finally:
        handle.remove()
        model.train(training)
    return torch.stack([features if features.ndim == 1 else features[-1] for features in seen])
