"""What an adapter comes down to outside of fedray: the few forms that all methods' models have.

    lora      one LoRA, as it trained
    folded    one LoRA that stands for several branches, y = W0 x + B' A' x with B' = s [w_L B, w_R B_R], A' = [A; A_R],
              or B' = B R of a core between frames: the same function, up to rounding
    reft      one intervention per place
    full      the whole model
    mixture   branches whose weights depend on the input, or two interventions per place: no single LoRA or LoReFT

The form follows from the adapter's modules, so it holds for every method, a user's own included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.products import pad
from fedray.errors import ConfigError, choices

Form = Literal["lora", "folded", "reft", "full", "mixture"]

LORA = {"lora", "rest", "mixer", "gate", "core", "frames"}
REFT = {"reft", "rest", "mixer"}


@dataclass(frozen=True)
class SingleLora:
    """y = W0 x + (alpha / r) · B A x, with one rank r for all layers.

    Attributes:
        factors: by the layer's path, B [d_out, r] and A [r, d_in].
    """

    factors: Mapping[str, LowRank]
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return next(iter(self.factors.values())).rank

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def form_of(adapter: Adapter) -> Form:
    """Return the adapter's form; values are not needed.

    Raises:
        ConfigError: its modules are those of an adapter kind that fedray does not have.
    """
    names = set(adapter.names) - {"head"}
    if names == {"full"}:
        return "full"
    if adapter.targets and names <= LORA:
        if any(layer.mixing is not None and not layer.mixing.constant for layer in adapter.targets.values()):
            return "mixture"
        return "lora" if names == {"lora"} else "folded"
    if adapter.places and names <= REFT:
        return "reft" if names == {"reft"} else "mixture"
    raise ConfigError(
        f"adapter: the groups {choices(sorted(names))} belong to an adapter kind of its own, whose modules no other "
        "library has; only LoRA, LoReFT and whole models are exported"
    )


def single_lora(adapter: Adapter) -> SingleLora:
    """Return the one LoRA of an adapter of the form `lora` or `folded`.

    Components without effect are left out of a folded one; layers with fewer components than others are filled up with
    zeros.
    """
    tensors = adapter.tensors()
    if form_of(adapter) == "lora":
        factors = {path: LowRank(B=tensors[f"lora.{path}.B"], A=tensors[f"lora.{path}.A"]) for path in adapter.targets}
        return SingleLora(factors, next(iter(adapter.targets.values())).alpha)
    folded: dict[str, LowRank] = {}
    for path, layer in adapter.targets.items():
        if f"core.{path}.core" in tensors:
            b, core = tensors[f"frames.{path}.B"], tensors[f"core.{path}.core"]
            branches = [(layer.scale, LowRank(B=b @ core, A=tensors[f"frames.{path}.A"]))]
        else:
            w_rest, w_own = (1.0, 1.0) if layer.mixing is None else layer.mixing.weights()
            weights = {"lora": layer.scale * w_own, "rest": layer.scale * w_rest}
            branches = [
                (weight, LowRank(B=tensors[f"{group}.{path}.B"], A=tensors[f"{group}.{path}.A"]))
                for group, weight in weights.items()
                if f"{group}.{path}.A" in tensors
            ]
        folded[path] = _concatenated(branches)
    rank = max(1, *(x.rank for x in folded.values()))
    return SingleLora({path: pad(x, rank) for path, x in folded.items()}, float(rank))


def _concatenated(branches: list[tuple[float, LowRank]]) -> LowRank:
    """Return Σ w B A as one matrix of concatenated factors, without components that are zero."""
    b = np.concatenate([weight * x.B.astype(np.float64) for weight, x in branches], axis=1)
    a = np.concatenate([x.A for _, x in branches], axis=0)
    acts = b.any(axis=0) & a.any(axis=1)
    return LowRank(B=b[:, acts].astype(np.float32), A=a[acts].astype(np.float32))
