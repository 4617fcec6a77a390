"""LoRA (arXiv 2106.09685) on peft's layers: an individual branch and, for FedALT and FedHFT, a frozen second one."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.context import ForwardContext
from fedray.adapters.draws import draw_lora, draw_mixer, draw_zeros
from fedray.adapters.group import Draw, Entry, Group
from fedray.adapters.heads import head_group, head_modules, is_meta
from fedray.config import LoraSection
from fedray.errors import ConfigError, choices, nearest

if TYPE_CHECKING:
    from fedray.adapters.branched import BranchedLinear, Mixer

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
    seed: int = 0,
) -> Adapter:
    """Put a LoRA on every target layer of the model, in place, and freeze everything else.

    y = W0 x + s · w_L B A drop(x) + s · w_R B_R A_R drop(x), s = section.alpha / section.rank; see
    `fedray.adapters.branched`. Groups: "lora" (A, B per target), with a second branch "rest" (A, B, zero at first),
    with an adaptive mixer "mixer" (G), and "head" where the model has one. All but "rest" train until
    `set_trainable` chooses.

    Args:
        model: a transformers model, also on the meta device; attached to at most once.
        rest_rank: rank of the frozen second branch; None: there is none.
        clip_rest: whether no target's second branch has a rank above min(d_out, d_in), which holds every matrix.
        rest_dropout: whether the second branch shares the first one's dropout draw (FedALT) or sees x itself (FedHFT).
        mixer: `adaptive`, a fixed α on the individual branch (1 − α on the other), or `none` (the default): both 1.
        seed: keys the first values of A and G.

    Raises:
        ConfigError: a target that the model does not have, or that peft does not support in this family.
        ValueError: the model already has a LoRA.
    """
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
        layer.complete(path, context, section.dropout, rank, rest_dropout, "none" if mixer is None else mixer)
        layers[path] = layer
    groups = _groups(layers, rest_rank is not None, rest_rank is not None and mixer == "adaptive")
    adapter = Adapter(model, groups + ([head] if head else []), context, layers)
    adapter.set_trainable(*(name for name in adapter.names if name != "rest"))
    model.train(model.training)  # the new modules take over the model's mode
    if not is_meta(model):
        adapter.load("lora", draw_lora(adapter.layout("lora"), seed))
        if "mixer" in adapter.names:
            adapter.load("mixer", draw_mixer(adapter.layout("mixer"), seed))
    return adapter


def _groups(layers: "dict[str, BranchedLinear]", rest: bool, mixer: bool) -> list[Group]:
    def group(name: str, entries: "Callable[[BranchedLinear, str], Iterable[Entry]]", draw: Draw) -> Group:
        return Group(name, (entry for path, layer in layers.items() for entry in entries(layer, path)), draw)

    from fedray.adapters.branched import BranchedLinear

    groups = [group("lora", BranchedLinear.own_entries, draw_lora)]
    if rest:
        groups.append(group("rest", BranchedLinear.rest_entries, draw_zeros))
    if mixer:
        groups.append(group("mixer", BranchedLinear.mixer_entries, draw_mixer))
    return groups


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
