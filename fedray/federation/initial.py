"""The common starting point of a method's clients."""

from collections.abc import Sequence

from transformers import PretrainedConfig, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_head
from fedray.adapters.heads import head_group, label_text_head
from fedray.config import Config, MethodConfig, TierConfig
from fedray.methods.protocol import AnyMethod, Initial
from fedray.models.backbone import missing_head
from fedray.models.tokenizer import load_tokenizer
from fedray.training.base_model import load_base_model
from fedray.types import Vector


def common_head(
    model: PreTrainedModel,
    config: Config,
    architecture: PretrainedConfig,
    entry: MethodConfig,
    method: AnyMethod,
    tier: str,
    label_names: Sequence[str],
    device: str,
) -> Vector | None:
    """Return the first task head of a method's clients, as the method treats it; None if the model has no head.

    It is that of the backbone alone, before an adapter is attached, and in the common precision: a tier's own precision
    would give its clients another head. A checkpoint's own head is the same below a quantised base.

    Args:
        model: the tier's base model.
        tier: the tier's name.
        device: cuda or cpu, where the tier computes.
    """
    if head_group(model) is None:
        return None
    section = config.section_for(entry, tier).head
    treatment = getattr(method, "effective_head", getattr(method, "head", section))
    of_text = treatment == "frozen_label_text" and config.task == "classification"
    held = config.clients.tier(tier)
    if held.precision is not None and (of_text or not held.quantised):
        model = load_base_model(config, architecture, tier, TierConfig(share=1.0), device)
    if of_text:
        return label_text_head(model, load_tokenizer(config.model), label_names)
    return first_head(model, config.seed, keep=treatment != "frozen_random")


def first_head(model: PreTrainedModel, seed: int, keep: bool = True) -> Vector | None:
    """Return the model's own task head, with the parts drawn that its checkpoint lacks; None if it has no head.

    Args:
        keep: whether the parts stay that the checkpoint has; False draws the whole head.
    """
    head = head_group(model)
    if head is None:
        return None
    std = getattr(model.config, "initializer_range", 0.02)
    drawn = missing_head(model) if keep else [slot.module for slot in head.layout.slots]
    return draw_head(head.layout, head.read(), drawn, seed, std)


def draw_initial(adapter: Adapter, seed: int, head: Vector | None) -> Initial:
    """Return the first values of the adapter's groups, as each group draws them by seed.

    Args:
        adapter: may be attached to a model on the meta device, unless a group's first values are the model's own.
        head: the first task head, if there is one.
    """
    layouts = {name: adapter.layout(name) for name in adapter.names}
    vectors = {group.name: group.first_values(seed) for group in adapter.groups if group.name != "head"}
    return Initial(seed, layouts, vectors if head is None else vectors | {"head": head})
