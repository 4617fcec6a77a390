"""The common starting point of a method's clients."""

from transformers import PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_head
from fedray.adapters.heads import head_group
from fedray.methods.protocol import Initial
from fedray.models.backbone import missing_head
from fedray.types import Vector


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
