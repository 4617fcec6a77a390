"""What goes wrong while a client actor is set up, and not on shapes or in the process that checks the experiment."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.adapters.adapter import Adapter
from fedray.methods.fedavg import FedAvg
from fedray.training.engines.torch import TorchConfig


@dataclass(frozen=True)
class CannotAttach(FedAvg):
    """marks: folder in which every attempt leaves a file."""

    marks: str = ""

    def attach(self, model: Any) -> Adapter:
        if not next(model.parameters()).is_meta:
            (Path(self.marks) / str(os.getpid())).touch()
            raise LookupError("the blocks have other names")
        return super().attach(model)


class CannotPrepare(TorchConfig):
    """An engine for which a node cannot be prepared."""

    prepares_node = True

    def prepare_node(self, device: str) -> None:
        raise LookupError("no compiler on this node")
