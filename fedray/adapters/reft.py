"""Representation fine-tuning (ReFT, arXiv 2404.03592; FedReFT, arXiv 2508.20295): pyreft's interventions, attached with
hooks of our own to the residual stream of any backbone.

    LoReFT    h + Rᵀ(W h + b − R h)       R: [r, d] with orthonormal rows, W: [r, d], b: [r]
    NoReFT    h + Pᵀ(W h + b − P h)       P: [r, d], free
    DiReFT    h + Rᵀ(W h + b)             as pyreft; NodiReFT: with P in place of R, as the ReFT paper's DiReFT

With a mixer there are two interventions in every place, Φ_L that trains and Φ_R that is frozen, and a token becomes
h + w_L (Φ_L(h) − h) + w_R (Φ_R(h) − h), as FedALT (arXiv 2503.11880) does with two LoRAs.

Two corrections to pyreft's modules (the rotation is re-registered, state is loaded by `RotationEntry`): their default
orthogonal parametrization keeps a d × d matrix and completes it at random whenever R is assigned. `reft.rotation` says
whether R trains in its own coordinates, without that matrix, or in pyreft's (`relative_rotation.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers.modeling_layers import GradientCheckpointingLayer

from fedray.adapters.adapter import Adapter
from fedray.adapters.context import ForwardContext
from fedray.adapters.draws import draw_mixer, draw_reft
from fedray.adapters.dropout import KeyedDropout
from fedray.adapters.group import Entry, Group
from fedray.adapters.heads import head_group, is_meta
from fedray.adapters.layout import Layout, Slot
from fedray.adapters.libraries import import_pyreft
from fedray.adapters.mixers import Mixer, Mixing, make_mixing
from fedray.adapters.positions import Positions, select, select_spread
from fedray.adapters.relative_rotation import RelativeRotation
from fedray.aggregation.stiefel import retract
from fedray.config import ReftSection
from fedray.errors import ConfigError, choices
from fedray.types import Vector

ORTHONORMAL = ("loreft", "direft")
"""The kinds whose projection is a rotation R rather than a free P."""

SUBTRACTING = ("loreft", "noreft")
"""The kinds that subtract the projection of h."""


@dataclass(frozen=True)
class RotationEntry(Entry):
    """R, exchanged as itself; `parameter` is the raw tensor of its parametrization: [d, r], or [2·d, r] if R trains
    relative to the loaded one. It never leaves, and weight decay must not act on it (its diagonal is rounded to
    integers: decay turns R into zeros).

    Attributes:
        rotate_layer: pyreft's, whose `weight` is Rᵀ.
    """

    rotate_layer: nn.Module | None = None

    def rotation(self, raw: Tensor) -> Tensor:
        """Return Rᵀ of a raw tensor, [..., d, r]."""
        return cast(Tensor, self._parametrization.forward(raw))

    def read(self) -> Vector:
        with torch.no_grad():
            weight = self.rotation(self.parameter)
        return np.ascontiguousarray(weight.T.cpu().numpy())

    def write(self, tensor: Vector) -> None:
        """Assign the nearest rotation: the parametrization would silently normalise anything else its own way."""
        value = torch.from_numpy(retract(tensor)).to(self.parameter.device)
        self.parameter.data.copy_(self._parametrization.right_inverse(value.T.contiguous()))

    @property
    def _parametrization(self) -> Any:
        """The map from the raw tensor to Rᵀ. Called by its methods: assigning `rotate_layer.weight` would give the raw
        tensor other memory than an engine knows of, and calling modules runs the hooks of one that partitions them."""
        assert self.rotate_layer is not None
        return cast(Any, self.rotate_layer).parametrizations.weight[0]


def attach_reft(model: nn.Module, section: ReftSection, *, mixer: Mixer | None = None, seed: int = 0) -> Adapter:
    """Put interventions on the output of the model's blocks, in place, and freeze everything else.

    Groups: "reft" with slots R or P [r, d], W [r, d], b [r] per block and per "prefix", "suffix" or "tied" (one φ for
    both, and for `all`), and "head" where the model has one. With a mixer also "rest", the second interventions, which
    do nothing at first, and with `adaptive` "mixer" (G [2, d] per place). All but "rest" train until `set_trainable`
    chooses.

    Args:
        model: a transformers model, also on the meta device; attached to at most once.
        mixer: what weighs a second, frozen intervention (`fedray.adapters.mixers`); None: there is none.
        seed: keys the first values.

    Raises:
        ConfigError: a layer index that the model does not have, a rank above the hidden size, no position at all.
        ValueError: the model already has interventions.
    """
    width = _width(model)
    positions = Positions.of(section)
    blocks = _chosen(model, section)
    if section.rank > width:
        raise ConfigError(f"reft.rank: {section.rank} is above the model's hidden size {width}")
    if not (positions.everything or positions.prefix or positions.suffix):
        raise ConfigError(f"reft.positions: {section.positions!r} names no token; for example f1+l1")
    base = getattr(model, "base_model", model)
    if hasattr(base, "reft"):
        raise ValueError("the model already has interventions; load the backbone anew for another adapter")
    model.requires_grad_(False)
    head = head_group(model)
    context = ForwardContext(model)
    base.reft = nn.ModuleDict()
    places: dict[str, Place] = {}
    reached: set[str] = set()
    for index, (path, block) in blocks.items():
        own = {where: _place(section, width, f"{path}.{where}", context, model, mixer) for where in positions.wheres}
        base.reft.update({f"{index}_{where}": place for where, place in own.items()})
        places |= {f"{path}.{where}": place for where, place in own.items()}
        block.register_forward_hook(_edit(path, width, own, positions, context, reached))
    model.register_forward_hook(_all_reached([path for path, _ in blocks.values()], reached))
    groups = [Group("reft", [e for name, place in places.items() for e in _entries(name, place.own)], draw_reft)]
    if mixer is not None:
        rest = [e for name, place in places.items() for e in _entries(name, place.rest)]
        groups.append(Group("rest", rest, partial(draw_idle, section.kind)))
        if mixed := [e for name, place in places.items() for e in place.mixer_entries(name)]:
            groups.append(Group("mixer", mixed, draw_mixer))
    adapter = Adapter(model, [*groups, *([head] if head else [])], context, places=places)
    adapter.set_trainable(*(name for name in adapter.names if name != "rest"))
    model.train(model.training)  # the new modules take over the model's mode
    if not is_meta(model):
        for group in groups:
            adapter.load(group.name, group.first_values(seed))
    return adapter


class Place(nn.Module):
    """The interventions of one block and one kind of position.

    Args:
        positions: the tokens that the block's interventions edit, of which these have their part.
        own: pyreft's intervention that trains.
        rest: a second, frozen one; None: there is none.
        mixing: weighs the two.
    """

    def __init__(
        self, positions: Positions, own: nn.Module, rest: nn.Module | None = None, mixing: Mixing | None = None
    ):
        super().__init__()
        self.positions, self.own, self.rest, self.mixing = positions, own, rest, mixing

    def forward(self, tokens: Tensor, **counts: Any) -> Tensor:
        """Edit tokens, float32 [n, d]; in a client batch `counts` says how many each member has."""
        edited: Tensor = self.own(tokens, **counts)
        if self.rest is None or self.mixing is None:
            return edited
        for _, linear in self.mixing.linears():
            linear.counts = counts.get("counts")  # type: ignore[assignment]
        w_rest, w_own = self.mixing(tokens)
        mixed: Tensor = tokens + w_own * (edited - tokens) + w_rest * (self.rest(tokens, **counts) - tokens)
        return mixed

    def mixer_entries(self, name: str) -> Iterator[Entry]:
        """Yield what the mixer holds; `name` is the place's."""
        for part, linear in self.mixing.linears() if self.mixing is not None else ():
            yield Entry(Slot(name, part, tuple(linear.weight.shape)), cast(nn.Parameter, linear.weight))


def draw_idle(kind: str, layout: Layout, seed: int = 0) -> Vector:
    """Return the first projections, with the W and b that leave every token as it is: W = R or P, b = 0; where the kind
    subtracts no projection, W = 0."""
    vector = draw_reft(layout, seed)
    views = layout.views(vector)
    for slot in layout.slots:
        if slot.part == "b":
            views[slot.name][...] = 0
        if slot.part == "W":
            projection = next(views[f"{slot.module}.{part}"] for part in "RP" if f"{slot.module}.{part}" in views)
            views[slot.name][...] = projection if kind in SUBTRACTING else 0
    return vector


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's blocks by path, in order; an encoder-decoder's are its encoder's.

    They are the first list of `num_hidden_layers` modules, else the longest list. Lists of modules that transformers
    marks as blocks (their activations can be recomputed) go before others.

    Raises:
        ConfigError: there is no list of blocks, or several that belong together (XLM's attentions and feed-forward
            layers, Funnel's stages).
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    marked = {
        path: blocks
        for path, blocks in lists.items()
        if len(blocks) and all(isinstance(block, GradientCheckpointingLayer) for block in blocks)
    }
    lists = marked or {
        path: blocks for path, blocks in lists.items() if not all(isinstance(block, nn.ModuleList) for block in blocks)
    }
    if not lists:
        raise ConfigError(f"reft: {type(model).__name__} has no list of blocks; interventions need one")
    path = max(lists, key=lambda path: (len(lists[path]) == depth, len(lists[path])))
    parent, length = path.rpartition(".")[0], len(lists[path])
    parts = [other for other in lists if other.rpartition(".")[0] == parent and len(lists[other]) == length]
    if len(parts) > 1:
        raise ConfigError(
            f"reft: {type(model).__name__} has no single list of blocks, but {choices(parts)}; use `adapter: lora`"
        )
    return {f"{path}.{index}": block for index, block in enumerate(lists[path])}


def _width(model: nn.Module) -> int:
    """Return how many values the model holds per token between its blocks; attribute maps of configurations give
    n_embd, d_model and the like this name."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def _chosen(model: nn.Module, section: ReftSection) -> dict[int, tuple[str, nn.Module]]:
    blocks = list(find_blocks(model).items())
    indices = range(len(blocks)) if section.layers == "all" else sorted(set(section.layers))
    for index in indices:
        if not 0 <= index < len(blocks):
            raise ConfigError(f"reft.layers: no block {index}; the model has blocks 0 to {len(blocks) - 1}")
    return {index: blocks[index] for index in indices}


def _place(
    section: ReftSection, width: int, name: str, context: ForwardContext, model: nn.Module, mixer: Mixer | None
) -> Place:
    positions, own = Positions.of(section), _intervention(section, width, name, context, model)
    if mixer is None:
        return Place(positions, own)
    rest = _intervention(section, width, name, context, model)
    return Place(positions, own, rest, make_mixing(mixer, width, 0, next(model.parameters()).device, None))


def _intervention(section: ReftSection, width: int, name: str, context: ForwardContext, model: nn.Module) -> nn.Module:
    """Return pyreft's intervention with uninitialised W and b, and the projection R (the first unit vectors) or P."""
    import_pyreft()
    from pyreft import interventions as pyreft

    kinds = {
        "loreft": pyreft.LoreftIntervention,
        "noreft": pyreft.NoreftIntervention,
        "direft": pyreft.DireftIntervention,
        "nodireft": pyreft.NodireftIntervention,
    }
    device = next(model.parameters()).device
    rank = section.rank
    # Built tiny, since its layers are replaced below: pyreft's own would factorise a d × d matrix each.
    with torch.random.fork_rng(devices=[]):
        module: Any = kinds[section.kind](embed_dim=rank, low_rank_dimension=rank, dtype=torch.float32, add_bias=False)
    module.embed_dim = module.interchange_dim = None
    module.learned_source = _empty_linear(width, rank, True, device)
    module.dropout = KeyedDropout(section.dropout, name, context)
    if section.kind in ORTHONORMAL:
        module.rotate_layer = _rotate_layer(pyreft.LowRankRotateLayer, section, width, device)
    else:
        module.proj_layer = _empty_linear(width, rank, False, device)
    return cast(nn.Module, module)


def _empty_linear(d_in: int, d_out: int, bias: bool, device: torch.device) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias, device="meta", dtype=torch.float32).to_empty(device=device)


def _rotate_layer(layer_class: Any, section: ReftSection, width: int, device: torch.device) -> nn.Module:
    """Torch's parametrization is left out on the meta device: its raw tensor has the weight's shape anyway."""
    rank = section.rank
    with device:
        layer: nn.Module = layer_class(width, rank, init_orth=False)
    if section.rotation == "relative":
        if device.type != "meta":
            layer.weight = nn.Parameter(torch.eye(width, rank, dtype=torch.float32, device=device))
        parametrize.register_parametrization(layer, "weight", RelativeRotation())
    elif device.type != "meta":
        layer.weight = nn.Parameter(torch.eye(width, rank, dtype=torch.float32, device=device))
        parametrizations.orthogonal(layer, orthogonal_map="householder", use_trivialization=False)
        raw = cast(Any, layer).parametrizations.weight.original
        raw.data = raw.data.contiguous()  # LAPACK leaves columns, which no engine can put into one flat buffer
    return layer


def _entries(name: str, module: Any) -> list[Entry]:
    source = module.learned_source
    rank, width = source.weight.shape
    if hasattr(module, "rotate_layer"):
        layer = module.rotate_layer
        raw = layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight
        projection: Entry = RotationEntry(Slot(name, "R", (rank, width)), raw, decays=False, rotate_layer=layer)
    else:
        projection = Entry(Slot(name, "P", (rank, width)), module.proj_layer.weight)
    return [
        projection,
        Entry(Slot(name, "W", (rank, width)), source.weight),
        Entry(Slot(name, "b", (rank,)), source.bias),
    ]


def _edit(
    path: str,
    width: int,
    own: Mapping[str, Place],
    positions: Positions,
    context: ForwardContext,
    reached: set[str],
) -> Callable[..., Any]:
    """Return the forward hook of the block at a path, which adds the path to what a pass has reached."""

    def edit(hidden: Tensor) -> Tensor:
        """[batch, tokens, d] in the base's type; only the selected tokens are gathered, edited in float32, put back."""
        if context.batch is None:
            raise RuntimeError("interventions need input_ids or inputs_embeds passed to the whole model")
        if tuple(hidden.shape) != (*context.batch.shape, width):
            raise ConfigError(
                f"reft: {path} has an output of shape {tuple(hidden.shape)} for {context.batch.shape[0]} examples of "
                f"{context.batch.shape[1]} tokens and a hidden size of {width}; interventions need one vector per "
                "token; use `adapter: lora`"
            )
        tokens = hidden.reshape(-1, hidden.shape[-1])
        edited: list[tuple[Tensor, Tensor]] = []
        for where, index in select(positions, context.batch).items():
            if where not in own or len(index) == 0:
                continue
            if context.client_batch is not None:
                laid = select_spread(positions, context.batch, context.client_batch)[where]
                values = own[where](tokens.index_select(0, laid.index).float(), counts=laid.counts)
                edited.append((index, values if laid.own is None else values.index_select(0, laid.own)))
                continue
            with parametrize.cached():  # pyreft evaluates R twice
                edited.append((index, own[where](tokens.index_select(0, index).float())))
        if not edited:
            return hidden
        indices = torch.cat([index for index, _ in edited])
        values = torch.cat([value for _, value in edited]).to(hidden.dtype)
        return tokens.index_copy(0, indices, values).reshape(hidden.shape)

    def hook(block: nn.Module, args: Any, output: Any) -> Any:
        reached.add(path)
        if isinstance(output, tuple | list):
            return type(output)((edit(output[0]), *output[1:]))
        return edit(output)

    return hook


def _all_reached(paths: Sequence[str], reached: set[str]) -> Callable[..., None]:
    """Return a forward hook of the whole model: a model that runs a block without calling it skips the block's hook."""

    def hook(model: nn.Module, *_: Any) -> None:
        missed = [path for path in paths if path not in reached]
        reached.clear()
        if missed:
            raise ConfigError(
                f"reft: {type(model).__name__} does not call {choices(missed)} as modules, so nothing can be edited "
                "there; use `adapter: lora`"
            )

    return hook
