"""Words that every floor shares."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

ClientId = str
"""Name of a client, safe as a file name: letters, digits, `.`, `_`, `-`."""

Vector = npt.NDArray[np.float32]
"""One flat float32 vector; what it holds is said by a `Layout`."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Task = Literal["classification", "regression", "causal_lm"]

IGNORED = -100
"""Label of a token on which no loss is taken, as in torch and transformers."""


@dataclass(frozen=True)
class Client:
    """A virtual client as methods see it: a value, never an actor's attribute.

    index: position in the sorted list of all clients, 0 to K-1.
    num_examples: training examples of the client (n_k).
    tier: name of its capacity tier.
    mask_ratio: ρ_k in (0, 1], the share of output rows that its tier can hold (FedHFT).
    lora_rank: r_k, the LoRA rank that its tier can hold; None: the common one.
    reft_layers: the blocks whose output its tier edits; None: the common ones.
    """

    id: ClientId
    index: int
    num_examples: int
    tier: str = "default"
    mask_ratio: float = 1.0
    lora_rank: int | None = None
    reft_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and the configured metric over one split of one client."""

    loss: float
    metric: float
    num_examples: int
