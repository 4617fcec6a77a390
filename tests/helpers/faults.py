"""FedAvg with clients on whom something goes wrong, for tests of what happens then."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.errors import TrainingError
from fedray.methods.bases.shared_adapter import ClientState, GlobalAdapter
from fedray.methods.fedavg import FedAvg
from fedray.methods.protocol import Local
from fedray.training.trainer import LocalTrainer


@dataclass(frozen=True)
class Faulty(FedAvg):
    """fault: what goes wrong: `raise`, `diverge`, `kill`, `hang` in training; `nan`, `shape`, `scale`, `flip` of what
    is sent. clients: on whom. server_round: when; always without. times: how often, counted in files in `marks`;
    without, always."""

    fault: str = ""
    clients: tuple[str, ...] = ()
    server_round: int | None = None
    times: int | None = None
    marks: str = ""

    def train_client(
        self, adapter: Adapter, client_state: ClientState, downlink: GlobalAdapter, local: Local
    ) -> tuple[GlobalAdapter, ClientState]:
        if not self._goes_wrong(local):
            return super().train_client(adapter, client_state, downlink, local)
        if self.fault == "raise":
            raise RuntimeError("a fault")
        if self.fault == "diverge":
            raise TrainingError("its loss is nan")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            time.sleep(3600)
        sent, own = super().train_client(adapter, client_state, downlink, local)
        return replace(sent, adapter=_broken(sent.adapter, self.fault)), own

    def _goes_wrong(self, local: Local) -> bool:
        if local.client.id not in self.clients or self.server_round not in (None, local.server_round):
            return False
        if not isinstance(local, LocalTrainer):  # the walk on shapes
            return False
        if self.times is None:
            return True
        for number in range(self.times):
            try:
                (Path(self.marks) / f"{local.client.id}-{local.server_round}-{number}").touch(exist_ok=False)
                return True
            except FileExistsError:
                continue
        return False


def _broken(values: np.ndarray, fault: str) -> np.ndarray:  # type: ignore[type-arg]
    if fault == "nan":
        return np.where(np.arange(values.size) == 3, np.nan, values).astype(np.float32)
    if fault == "shape":
        return values[:-1]
    return {"scale": 1e6 * values, "flip": -values}[fault]
