"""Base class of methods whose clients keep a LoRA of their own, in a second branch beside the common one."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.draws import draw_lora
from fedray.adapters.kinds.lora import LoraKind
from fedray.adapters.lora import attach_lora
from fedray.adapters.mixers import Mixer
from fedray.errors import ConfigError
from fedray.methods.bases.shared_adapter import ClientState, PrivateState
from fedray.methods.fedavg import FedAvg
from fedray.methods.parts import heads
from fedray.methods.protocol import Initial
from fedray.types import Client


@dataclass(frozen=True)
class PersonalBranch(FedAvg):
    """FedAvg of the first branch; the second one is private. What each trains in a round, subclasses say."""

    def __post_init__(self) -> None:
        if type(self.adapter) is not LoraKind:
            kind = self.adapter.label
            raise ConfigError(f"{self.name}.adapter: {kind} has no branch for a personal LoRA; use adapter: lora")
        super().__post_init__()

    @property
    def mixer(self) -> Mixer:
        """What weighs the branches."""
        return "none"

    @property
    def personal_rank(self) -> int:
        """The private branch's rank; 0: there is none."""
        assert isinstance(self.adapter, LoraKind)
        return self.adapter.lora.rank

    @property
    def private(self) -> str | None:
        return "rest" if self.personal_rank else None

    def common(self, adapter: Adapter) -> Sequence[str]:
        """Return the names of what is common: the first branch, and the head if it trains."""
        return heads.trainable(self.effective_head, adapter, self.shared)

    def attach(self, model: nn.Module) -> Adapter:
        assert isinstance(self.adapter, LoraKind)
        adapter = attach_lora(model, self.adapter.lora, rest_rank=self.personal_rank or None, mixer=self.mixer)
        adapter.set_trainable(*self.common(adapter), *(["rest"] if self.personal_rank else []))
        return adapter

    def init_client(self, initial: Initial, client: Client) -> ClientState:
        state = ClientState(heads.initial(self.effective_head, initial.head())[1])
        if self.private is None:
            return state
        return PrivateState(state.head, draw_lora(initial.layouts["rest"], initial.seed, "personal"))
