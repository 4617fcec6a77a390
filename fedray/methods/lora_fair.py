"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961): FedAvg's Ā, with the B that makes up best for what Ā misses.

    B ← argmin_B ‖B Ā − Σ_k w_k B_k A_k‖² + μ ‖B − B̄‖²,   μ = λ tr(Ā Āᵀ) / r
      = (Σ_k w_k B_k (A_k Āᵀ) + μ B̄)(Ā Āᵀ + μ I)⁻¹,       A ← Ā

Departures: the paper minimises a cosine distance by gradient steps, which ignores the scale of the product; the squared
distance has this closed form, and μ is in units of Ā, so that λ has none. The paper has one rank: factors of tiers with
fewer components are filled up with zeros.

The paper's settings, after a third party's notes: λ 0.01, vision models, rank 16, SGD with lr 0.01, batch 128.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.products import ridge
from fedray.errors import ConfigError
from fedray.methods.bases.combined_factors import Combined


@dataclass(frozen=True)
class LoraFair(Combined):
    """FedAvg with a corrected B.

    Attributes:
        penalty: λ, 0.01 in the paper. The larger it is, the closer B stays to B̄, with which it is FedAvg; with 0 the
            remaining error is orthogonal to the rows of Ā.
    """

    penalty: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty < math.inf:
            raise ConfigError(f"lora_fair.penalty: expected a number of at least 0, got {self.penalty}")

    def combine(self, factors: Sequence[LowRank], counts: Sequence[int]) -> LowRank:
        return ridge(factors, counts, self.penalty)


ENTRY = LoraFair
