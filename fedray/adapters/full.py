"""Full fine-tuning: the whole model is the adapter. The denominator of every communication and memory ratio."""

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.context import ForwardContext
from fedray.adapters.group import Entry, Group
from fedray.adapters.heads import head_group
from fedray.adapters.layout import Slot


def attach_full(model: nn.Module) -> Adapter:
    """Return the adapter whose group "full" is every parameter of the base model, and "head" its head, if any.

    Nothing is inserted. Tied parameters are one. Training writes to this process's own copy of the mapped weights.
    """
    head = head_group(model)
    apart = {id(parameter) for parameter in head.parameters()} if head else set()
    entries = [
        Entry(Slot(name, "tensor", tuple(parameter.shape)), parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in apart
    ]
    adapter = Adapter(model, [Group("full", entries), *([head] if head else [])], ForwardContext(model))
    adapter.set_trainable(*adapter.names)
    return adapter
