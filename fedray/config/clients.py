"""The section `clients`: how many there are, on what they run, and how strong they are."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fedray.config.section import PositiveInt, Section
from fedray.errors import choices


class TierConfig(Section):
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of all clients that belong to this tier; the shares of all tiers add up to 1."""
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """FedHFT's ρ: share of output rows that a client of this tier can hold."""


class ClientsConfig(Section):
    count: PositiveInt | None = None
    """Number of clients K. by_column, by_file: taken from the data; given, the `count` largest are kept."""
    per_round: PositiveInt | None = None
    """Cohort size; default all."""
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs of one client actor; may be a fraction."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of one client actor; may be a fraction. Default: an equal share of the cluster's, 0 where it has none."""
    actors: PositiveInt | None = None
    """Number of client actors; default as many as the cluster can hold, and no more than the cohort can use."""
    threads: PositiveInt = 1
    """Threads of torch per client actor."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a client is run again elsewhere in a round after the actor that trained it died."""
    tiers: dict[str, TierConfig] = Field(default_factory=dict)
    """Capacity tiers by name; clients are dealt to them by seed. Default: one tier, `default`."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = sum(tier.share for tier in self.tiers.values())
        if self.tiers and abs(total - 1) > 1e-6:
            raise ValueError(
                f"the shares of the tiers {choices(self.tiers)} add up to {total:g}; they must add up to 1"
            )
        if self.count and self.per_round and self.per_round > self.count:
            raise ValueError(f"per_round is {self.per_round}, but there are only {self.count} clients (clients.count)")
        return self
