"""LoRA (arXiv 2106.09685) on peft's layers: one branch and, for personalised methods, a second one; or one branch with
a core (Fed-SB)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.context import ForwardContext
from fedray.adapters.draws import draw_frames, draw_lora, draw_mixer, draw_zeros
from fedray.adapters.group import Draw, Entry, Group
from fedray.adapters.heads import head_group, head_modules, is_meta
from fedray.adapters.libraries import import_peft
from fedray.adapters.similarity import attach_similarity
from fedray.config import LoraSection
from fedray.errors import ConfigError, choices, nearest

if TYPE_CHECKING:
    from fedray.adapters.branched import BranchedLinear
    from fedray.adapters.mixers import Mixer

QUERY_VALUE = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("Wqkv",),
    ("q_proj", "kv_b_proj"),
    ("q_b_proj", "kv_b_proj"),
    ("q_b_proj", "kv_proj"),
    ("q_a_proj", "kv_b_proj"),
    ("kv_proj",),
    ("q", "v"),
    ("Wq", "Wv"),
    ("project_q", "project_v"),
    ("q_head", "v_head"),
    ("c_attn",),
    ("qkv_proj",),
    ("in_proj",),
)
"""What the families of models call their query and value layers, or the layer that computes them; the first convention
that a model follows is used. `in_proj` is DeBERTa's, and the input layer of Mamba's mixers, which have no attention and
whose other layers' weights are read without the layers being called (peft refuses some of them)."""

TO_AN_ENCODER = ("encoder_attn", "cross_attn")
"""What BART's and ProphetNet's kinds of decoders call their attention to an encoder."""


def attach_lora(
    model: nn.Module,
    section: LoraSection,
    *,
    rest_rank: int | None = None,
    clip_rest: bool = False,
    rest_dropout: bool = True,
    mixer: "Mixer | None" = None,
    core: bool = False,
    seed: int = 0,
) -> Adapter:
    """Put a LoRA on every target layer of the model, in place, and freeze everything else.

    y = W0 x + s · w_L B A drop(x) + s · w_R B_R A_R drop(x), s = section.alpha / section.rank; see
    `fedray.adapters.branched`. Groups: "lora" (A, B per target), with a second branch "rest" (A, B, zero at first),
    with a mixer that has values "mixer" (`adaptive`: G; `scalars`: w_R and w_L, 1 at first; `experts`: G and present, 0
    at first) and "gate" (`similarity`), and "head" where the model has one. With a core, "core" (R, zero at first) and
    "frames" (A and B, orthonormal) take the place of "lora". All but "rest" and "frames" train until `set_trainable`
    chooses.

    Args:
        model: a transformers model, also on the meta device; attached to at most once.
        rest_rank: rank of the second branch; None: there is none. For `experts`, a multiple of the first one's.
        clip_rest: whether no target's second branch has a rank above min(d_out, d_in), which holds every matrix.
        rest_dropout: whether the second branch shares the first one's dropout draw (FedALT) or sees x itself (FedHFT).
        mixer: what weighs the branches (`fedray.adapters.mixers`); default `none`: both weights are 1.
        core: whether the branch is s · B R A.
        seed: keys the first values.

    Raises:
        ConfigError: a target that the model does not have, or that peft does not support in this family; a rank that a
            core cannot have.
        ValueError: the model already has a LoRA.
    """
    import_peft()
    import peft

    from fedray.adapters.branched import LINEAR, NAME, BranchedLinear

    if any(isinstance(module, BranchedLinear) for module in model.modules()):
        raise ValueError("the model already has a LoRA; load the backbone anew for another adapter")
    paths = _targets(model, section.targets)
    model.requires_grad_(False)
    head = head_group(model)
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # annotated as int, used as a number
        target_modules=paths,
        init_lora_weights=False,
    )
    config._register_custom_module(dict.fromkeys(LINEAR, BranchedLinear))
    try:
        with _no_bitsandbytes():
            # On the meta device peft's own first values cost nothing and draw nothing from the global generator.
            peft.inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    context = ForwardContext(model)
    layers: dict[str, BranchedLinear] = {}
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, BranchedLinear)
        rank = min(rest_rank, layer.d_out, layer.d_in) if rest_rank is not None and clip_rest else rest_rank
        mixing = "none" if mixer is None else mixer
        layer.complete(path, context, section.dropout, rank, rest_dropout, mixing, core)
        layers[path] = layer
        if core and section.rank > min(layer.d_in, layer.d_out):
            raise ConfigError(
                f"lora.rank: {section.rank}, but {path!r} is [{layer.d_out}, {layer.d_in}] and has no more than "
                f"{min(layer.d_in, layer.d_out)} orthonormal components"
            )
    groups = _groups(layers, rest_rank is not None, core)
    if mixer == "similarity":
        groups.append(attach_similarity(model, context))
    adapter = Adapter(model, groups + ([head] if head else []), context, layers)
    adapter.set_trainable(*(name for name in adapter.names if name not in ("rest", "frames")))
    model.train(model.training)  # the new modules take over the model's mode
    if not is_meta(model):
        for group in groups:
            adapter.load(group.name, group.first_values(seed))
    return adapter


def _groups(layers: "dict[str, BranchedLinear]", rest: bool, core: bool) -> list[Group]:
    def group(name: str, entries: "Callable[[BranchedLinear, str], Iterable[Entry]]", draw: Draw) -> Group:
        return Group(name, (entry for path, layer in layers.items() for entry in entries(layer, path)), draw)

    from fedray.adapters.branched import BranchedLinear

    if core:
        own = [group("core", BranchedLinear.core_entries, draw_zeros)]
        own.append(group("frames", BranchedLinear.own_entries, draw_frames))
    else:
        own = [group("lora", BranchedLinear.own_entries, draw_lora)]
    if rest:
        own.append(group("rest", BranchedLinear.rest_entries, draw_zeros))
        mixer = group("mixer", BranchedLinear.mixer_entries, draw_mixer)
        own += [mixer] if mixer.entries else []
    return own


@contextmanager
def _no_bitsandbytes() -> Iterator[None]:
    """Let peft find no bitsandbytes within. Where it is installed, peft imports it, and torch's compiler with it, for
    layers that no model here has: a second of processor time in every process."""
    from peft.tuners.lora import model

    names = ("is_bnb_available", "is_bnb_4bit_available")
    known = {name: getattr(model, name) for name in names}
    for name in names:
        setattr(model, name, lambda: False)
    try:
        yield
    finally:
        for name in names:
            setattr(model, name, known[name])


def _targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths of the linear layers called one of `names` (default: query and value), in the model's order:
    without the head, the output layer, and a lone decoder's attention to an encoder, which is never called."""
    from fedray.adapters.branched import LINEAR

    apart = list(head_modules(model).values())
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        apart += [module for path, module in model.named_modules() if path.rpartition(".")[2] in TO_AN_ENCODER]
    never = {id(inner) for module in apart for inner in module.modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        path: path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, LINEAR) and id(module) not in never and module is not output
    }
    available = sorted(set(linear.values()))
    if not names:
        names = _default_targets(model, available)
    if not names:
        raise ConfigError(
            f"lora.targets: no query and value layers are known for {type(model).__name__}; name its target layers, "
            f"from: {choices(available) or 'none, since it has no linear layers besides its head; use adapter: reft'}"
        )
    for name in names:
        if name not in available:
            raise ConfigError(
                f"lora.targets: {type(model).__name__} has no linear layer {name!r}{nearest(name, available)}; "
                f"it has {choices(available)}"
            )
    return [path for path, name in linear.items() if name in names]


def _default_targets(model: nn.Module, available: Sequence[str]) -> Sequence[str]:
    """Return the names of the query and value layers: by convention, else those that peft adapts in this family."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as FAMILIES

    convention = next((names for names in QUERY_VALUE if set(names) <= set(available)), None)
    if convention is not None:
        return convention
    names = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    return tuple(names) if not isinstance(names, str) and set(names) <= set(available) else ()
