"""Opens the folder that this file is in, without fedray: `model = load("path/to/the/folder")`.

It needs torch, transformers and safetensors. README.md says what the model is, and why peft or pyreft cannot open it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

Tensors = dict[str, Tensor]


def load(folder: str | Path, base: str | None = None) -> nn.Module:
    """Return the model in evaluation mode.

    Args:
        folder: with fedray.json and fedray.safetensors.
        base: folder or hub id of the base model, where it has moved.
    """
    folder = Path(folder)
    settings = json.loads((folder / "fedray.json").read_text("utf-8"))
    tensors: Tensors = load_file(folder / "fedray.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    model = getattr(transformers, settings["class"]).from_pretrained(
        base or settings["base"] or folder / "base",
        config=config,
        dtype=getattr(torch, settings["dtype"]),
        **settings["options"],
    )
    if settings["pooling"] is not None:
        model = Pooled(model, settings)
    for name in settings["heads"]:
        model.get_submodule(name).float().register_forward_pre_hook(_widen)
    for name in settings["parameters"]:
        model.get_parameter(name).data = tensors[f"parameter.{name}"]
    current = Pass(model)
    if settings["lora"] is not None:
        put_lora(model, settings["lora"], tensors, current)
    if settings["reft"] is not None:
        put_interventions(model, settings["reft"], tensors, current)
    opened: nn.Module = model.eval()
    return opened


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A task head is float32, whatever the base model is."""
    return tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)


class Pooled(nn.Module):
    """A linear layer on one vector per text."""

    def __init__(self, base: Any, settings: Any):
        super().__init__()
        self.config, self.pooling, self.prefix = base.config, settings["pooling"], settings["prefix"]
        setattr(self, self.prefix, base)
        self.classifier = nn.Linear(base.config.hidden_size, base.config.num_labels)

    @property
    def base_model(self) -> Any:
        """The model below the head."""
        return getattr(self, self.prefix)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """Return the logits [examples, classes]."""
        if self.config.is_encoder_decoder:
            start = getattr(self.config, "decoder_start_token_id", None)
            start = self.config.pad_token_id if start is None else start
            shifted = [torch.full_like(input_ids[:, :1], start), input_ids[:, :-1]]
            inputs["decoder_input_ids"] = torch.cat(shifted, dim=1)
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features = self._pool(states, mask)
        if self.pooling["normalised"]:
            features = math.sqrt(features.shape[-1]) * functional.normalize(features, dim=-1)
        logits = self.classifier(features)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling["kind"] == "mean":
            weights = mask[:, :, None].float()
            return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        places = torch.arange(mask.shape[1], device=mask.device)
        chosen = (mask != 0).long().argmax(1) if self.pooling["kind"] == "cls" else (places * (mask != 0)).argmax(1)
        return states[torch.arange(len(states), device=states.device), chosen].float()


class Pass:
    """What the current forward pass reads.

    Attributes:
        valid: [examples, tokens], False at padding.
        decoding: whether a cache holds earlier tokens.
        alpha: each example's weight of the second LoRA, [examples]; None: there is none.
    """

    valid: Tensor
    decoding: bool

    def __init__(self, model: nn.Module):
        self.alpha: Tensor | None = None
        model.register_forward_pre_hook(self.begin, with_kwargs=True)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the pass reads."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        mask = kwargs.get("attention_mask")
        shape = tokens.shape[:2]
        valid = torch.ones(shape, device=tokens.device) if mask is None else mask[:, -shape[1] :]
        cache = kwargs.get("past_key_values")
        self.valid, self.decoding = valid.bool(), cache is not None and cache.get_seq_length() > 0


class Layer(nn.Module):
    """y = W0 x + s w_L B A x + s w_R B_R A_R x.

    Args:
        layer: W0.
        tensors: A and B; of a second LoRA rest.A and rest.B; what the mixer reads: G, present.
        mixer: what weighs the two: `token` (softmax of G x), `router` (experts), `similarity` (of the example).
    """

    A: Tensor
    B: Tensor
    rest_A: Tensor
    rest_B: Tensor
    G: Tensor
    present: Tensor

    def __init__(self, layer: nn.Module, tensors: Tensors, scale: float, mixer: str, current: Pass):
        super().__init__()
        self.base_layer, self.scale, self.mixer, self.current = layer, scale, mixer, current
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, [..., d_out]."""
        y: Tensor = self.base_layer(x)
        x = x.float()
        own = functional.linear(functional.linear(x, self.A) * self.scale, self.B)
        if self.mixer == "none":
            return (y + own).to(y.dtype)
        w_rest, w_own = getattr(self, f"_{self.mixer}")(x)
        inner = functional.linear(x, self.rest_A) * self.scale
        if w_rest.shape[-1] > 1:  # one weight per expert, whose components stand one after another's
            inner, w_rest = inner * w_rest.repeat_interleave(len(self.A), -1), 1.0
        mixed: Tensor = y + w_own * own + w_rest * functional.linear(inner, self.rest_B)
        return mixed.to(y.dtype)

    def _token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _token_weights(x, self.G)

    def _similarity(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, (examples, tokens) = self.current.alpha, self.current.valid.shape
        assert alpha is not None
        if x.ndim == 2 and len(x) == examples * tokens:
            alpha = alpha.repeat_interleave(tokens)
        alpha = alpha.reshape(-1, *(1 for _ in x.shape[1:]))
        return alpha, 1 - alpha

    def _router(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of one's own expert, the others, and as many copies of one's own, the largest as many logits count as there
        are experts."""
        present = functional.linear(x.new_ones(*x.shape[:-1], 1), self.present) != 0
        others = present.shape[-1]
        counted = torch.cat([torch.ones_like(present[..., :1]), present, present], -1)
        logits = functional.linear(x, self.G).masked_fill(~counted, float("-inf"))
        place = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
        left_out = place > present.sum(-1, keepdim=True)
        w_rest = torch.softmax(logits.masked_fill(left_out, float("-inf")), dim=-1)[..., 1 : 1 + others]
        return w_rest, 1 - w_rest.sum(-1, keepdim=True)


def _token_weights(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(functional.linear(x, g), dim=-1)
    return weights[..., :1], weights[..., 1:]


def put_lora(model: Any, settings: Any, tensors: Tensors, current: Pass) -> None:
    """Put the LoRAs on their layers."""
    for path in settings["layers"]:
        own = {part: tensors[f"lora.{path}.{part}"] for part in ("A", "B")}
        for group, names in (("rest", ("A", "B")), ("mixer", ("G", "present"))):
            prefix = "rest." if group == "rest" else ""
            own |= {f"{prefix}{n}": tensors[f"{group}.{path}.{n}"] for n in names if f"{group}.{path}.{n}" in tensors}
        layer = Layer(model.get_submodule(path), own, settings["scale"], settings["mixer"], current)
        model.set_submodule(path, layer)
    if settings["mixer"] == "similarity":
        put_similarity(model, tensors["gate"], current)


def put_similarity(model: Any, gate: Tensor, current: Pass) -> None:
    """Compute every example's alpha before a pass: v · h / |h|, with h the last hidden state of its last token as the
    second LoRA alone computes it."""
    model.register_buffer("gate", gate)
    kept: Tensor | None = None

    @torch.no_grad()
    def weigh(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal kept
        if not current.decoding:
            inputs = {"input_ids": args[0]} if args else {}
            names = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
            inputs |= {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            current.alpha = torch.ones(len(current.valid), device=current.valid.device)
            states = model.base_model(**inputs).last_hidden_state
            last = (torch.arange(current.valid.shape[1], device=states.device) * current.valid).argmax(1)
            read = states[torch.arange(len(last), device=states.device), last].float()
            kept = functional.linear(functional.normalize(read, dim=-1), model.gate).squeeze(-1)
        current.alpha = kept

    model.register_forward_pre_hook(weigh, with_kwargs=True)


class Place(nn.Module):
    """The interventions at one kind of position of one block: h + Pᵀ(W h + b − P h), or without − P h.

    Args:
        tensors: P, W, b; of a second intervention rest.P, rest.W, rest.b; G, if it weighs the two per token.
        weights: (w_R, w_L) of the two, where they are constant.
    """

    P: Tensor
    W: Tensor
    b: Tensor
    rest_P: Tensor
    rest_W: Tensor
    rest_b: Tensor
    G: Tensor

    def __init__(self, tensors: Tensors, subtracts: bool, weights: tuple[float, float] | None):
        super().__init__()
        self.subtracts, self.weights, self.mixed = subtracts, weights, "rest.P" in tensors
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, tokens: Tensor) -> Tensor:
        """Edit tokens, [n, d]."""
        own = self._edit(tokens, self.P, self.W, self.b)
        if not self.mixed:
            return own
        rest = self._edit(tokens, self.rest_P, self.rest_W, self.rest_b)
        w_rest, w_own = _token_weights(tokens, self.G) if self.weights is None else self.weights
        return tokens + w_own * (own - tokens) + w_rest * (rest - tokens)

    def _edit(self, tokens: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Tensor:
        inner = functional.linear(tokens, w, b)
        return tokens + (inner - functional.linear(tokens, p) if self.subtracts else inner) @ p


def put_interventions(model: Any, settings: Any, tensors: Tensors, current: Pass) -> None:
    """Put the interventions on the outputs of their blocks."""
    blocks: dict[str, dict[str, Place]] = {}
    model.interventions = nn.ModuleDict()
    for name in settings["places"]:
        found: Tensors = {}
        for group, prefix in (("reft", ""), ("rest", "rest."), ("mixer", "")):
            for part, as_part in (("R", "P"), ("P", "P"), ("W", "W"), ("b", "b"), ("G", "G")):
                if f"{group}.{name}.{part}" in tensors:
                    found[f"{prefix}{as_part}"] = tensors[f"{group}.{name}.{part}"]
        path, _, where = name.rpartition(".")
        place = Place(found, settings["subtracts"], settings["weights"])
        blocks.setdefault(path, {})[where] = place
        model.interventions[name.replace(".", "_")] = place
    for path, places in blocks.items():
        model.get_submodule(path).register_forward_hook(_editing(places, settings["positions"], current))


def _editing(places: dict[str, Place], positions: Any, current: Pass) -> Any:
    def edit(hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        edited = tokens
        for where, mask in selected(positions, current).items():
            index = mask.reshape(-1).nonzero().squeeze(1)
            if where in places and len(index):
                values = places[where](tokens[index].float())
                edited = edited.index_copy(0, index, values.to(hidden.dtype))
        return edited.reshape(hidden.shape)

    def hook(block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)((edit(output[0]), *output[1:]))
        return edit(output)

    return hook


def selected(positions: Any, current: Pass) -> dict[str, Tensor]:
    """Return which tokens are edited, by the kind of position: the first `prefix` and the last `suffix` of the text (a
    prompt, where text is generated), or all."""
    if positions["everything"]:
        return {"tied": current.valid}
    if current.decoding:
        return {}
    rank = current.valid.cumsum(1)
    length = rank[:, -1:]
    most = length // 2 if positions["halves"] else length
    prefix = current.valid & (rank <= most.clamp(max=positions["prefix"]))
    suffix = current.valid & (rank > length - most.clamp(max=positions["suffix"])) & ~prefix
    return {"tied": prefix | suffix} if positions["tied"] else {"prefix": prefix, "suffix": suffix}
