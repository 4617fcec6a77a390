"""FedAdagrad (Reddi et al., arXiv 2003.00295): v ← v + Δ²."""

from typing import Annotated

from pydantic import Field

from fedray.aggregation.adaptive import Adaptive, Numbers


class Adagrad(Adaptive):
    """FedAdagrad: v ← v + Δ²; without momentum, unless `beta1` is set."""

    name = "adagrad"

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """β1, share of m that stays."""

    def second(self, v: Numbers, squares: Numbers) -> Numbers:
        return v + squares


ENTRY = Adagrad
