"""A sweep: many trials of one experiment, each with other values."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedray.config.section import PositiveInt, Section
from fedray.errors import choices, nearest

SCORES = ("personalised_mean", "aggregated_mean", "personalised_weighted_mean", "personalised_worst")
"""Metrics that are measured on examples: on validation examples as `validation_NAME`, on test examples as `NAME`."""

PER_ROUND = ("personalised_mean", "aggregated_mean", "train_loss")
"""Metrics that every evaluated round has."""

OF_THE_WHOLE = (
    "personalised_weighted_mean",
    "personalised_worst",
    "uplink_bytes",
    "downlink_bytes",
    "simulated_seconds",
    "wall_seconds",
)
"""Metrics that only a finished trial has."""

METRICS = tuple(dict.fromkeys((*PER_ROUND, *OF_THE_WHOLE, *(f"validation_{name}" for name in SCORES))))
"""All that is known of a finished trial."""


class AshaConfig(Section):
    """Asynchronous successive halving: of the trials that have come so far, only the best go on (Li et al. 2020)."""

    kind: Literal["asha"] = "asha"
    """Which scheduler."""
    grace_rounds: PositiveInt = 1
    """Rounds that every trial has."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One of so many goes on; decided after grace_rounds, grace_rounds · factor, grace_rounds · factor², ..."""


class SweepConfig(Section):
    """Many experiments around one: the points of a space, each with one method."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "sweep"
    """Name of the sweep; part of its folder's name."""
    base: dict[str, Any]
    """The experiment around which the sweep is: its sections, or the path of its file, from the sweep's folder."""
    space: dict[str, Any]
    """By dotted path of a field: a list of values, all of which are tried (a grid), or a range that is drawn from:
    {uniform: [0, 1]}, {loguniform: [1e-5, 1e-2]}, {randint: [1, 9]} (9 is left out), {choice: [4, 8, 16]}. `seed` and
    `method` are paths too; `method.NAME` is a hyperparameter of the trial's method."""
    num_samples: PositiveInt = 1
    """Draws from the ranges. Every draw is tried with every point of the grid, so with every seed and method."""
    metric: str = "personalised_mean"
    """What trials are compared by: of each round personalised_mean, aggregated_mean, train_loss, as of its last one;
    or of the whole trial personalised_worst, uplink_bytes, simulated_seconds, ..."""
    select_on: Literal["validation", "test"] = "validation"
    """Examples on which that metric is measured when trials are compared. `test` selects the best of many numbers,
    which is above what the selected trial has on new examples; some papers do it. Test scores are reported in both
    cases."""
    mode: Literal["max", "min"] | None = None
    """Whether more is better; default: as the metric says."""
    scheduler: AshaConfig | None = None
    """Which trials end early; default none. `asha`, or its settings."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; default as many as the cluster has room for, each with its client actors."""
    draws_seed: Annotated[int, Field(ge=0)] = 0
    """Keys the draws from the ranges; the experiments' own seeds are `seed` of the base or of the space."""

    @field_validator("scheduler", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (known := (*PER_ROUND, *OF_THE_WHOLE)):
            raise ValueError(f"no metric {value!r}{nearest(value, known)}; allowed: {choices(known)}")
        return value

    @property
    def selects_by(self) -> str:
        """Name of the metric of a trial by which trials are compared."""
        of_validation = self.metric in SCORES and self.select_on == "validation"
        return f"validation_{self.metric}" if of_validation else self.metric

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.space:
            raise ValueError("space: name at least one field and its values")
        if self.scheduler is not None and self.metric not in PER_ROUND:
            raise ValueError(
                f"scheduler: ends trials by a metric of each round ({choices(PER_ROUND)}), but metric is {self.metric}"
            )
        return self
