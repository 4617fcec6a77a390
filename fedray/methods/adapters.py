"""The adapter of a method without one of its own (local, head_only, fedavg): its kind's group, and the task head."""

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.kind import AdapterKind
from fedray.adapters.kinds.lora import LoraKind
from fedray.config import Head
from fedray.methods import heads

LORA = LoraKind()
"""What is attached where `adapter` is left out."""


def attach(model: nn.Module, kind: AdapterKind, head: Head) -> Adapter:
    """Attach the kind's adapter. Its group trains, and so does the head unless it is frozen."""
    adapter = kind.attach(model)
    adapter.set_trainable(*heads.trainable(head, adapter, kind.group))
    return adapter
