"""Which adapter a method without one of its own (local, head_only, fedavg) trains: LoRA, LoReFT, or the whole model."""

from typing import Literal

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.full import attach_full
from fedray.adapters.lora import attach_lora
from fedray.adapters.reft import attach_reft
from fedray.config import Head, LoraSection, ReftSection
from fedray.methods.parts import heads

AdapterKind = Literal["lora", "reft", "full"]


def attach(model: nn.Module, kind: AdapterKind, lora: LoraSection, reft: ReftSection, head: Head) -> Adapter:
    """Attach the adapter: the group `kind` and the head. Both train, unless the head is frozen."""
    if kind == "full":
        adapter = attach_full(model)
    else:
        adapter = attach_lora(model, lora) if kind == "lora" else attach_reft(model, reft)
    adapter.set_trainable(*heads.trainable(head, adapter, kind))
    return adapter
