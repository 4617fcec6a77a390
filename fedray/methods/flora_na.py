"""FLoRA-NA (arXiv 2509.26399): means of the factors whose product is close to the mean product.

    Â = Σ_k p_k A_k,  B̂ = Σ_k q_k B_k,   p, q = argmin ‖B̂ Â − Σ_k w_k B_k A_k‖

with p and q of their own for each target. The error is between that of the best factors of rank r (FlexLoRA) and that
of p = q = w (FedAvg).

Departures: the released code combines the changes of A and B and fits the unweighted mean by 200 steps of AdamW from
p = q = 1, on a loss divided by its smallest entry, of either sign; here q and p are solved for in turn from p = q = w,
in closed form. The paper has one rank: factors of tiers with fewer components are filled up with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedray.aggregation.low_rank import LowRank
from fedray.aggregation.products import least_squares
from fedray.errors import ConfigError
from fedray.methods.bases.combined_factors import Combined


@dataclass(frozen=True)
class FloraNa(Combined):
    """FedAvg with the weights of both factors fitted to the mean product.

    Attributes:
        sweeps: how often q and then p is solved for; 0 is FedAvg.
    """

    sweeps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweeps < 0:
            raise ConfigError(f"flora_na.sweeps: expected at least 0, got {self.sweeps}")

    def combine(self, factors: Sequence[LowRank], counts: Sequence[int]) -> LowRank:
        return least_squares(factors, counts, self.sweeps)


ENTRY = FloraNa
