"""The section `partition`: what all partitioners have in common, and what a partitioner implements.

A partitioner is a subclass of `PartitionConfig` with configuration fields of its own and the method `assign`. Built-in
ones are the modules of `fedray.data.partitions`, found by the field `kind`; a user's own is given by the field `class`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from fedray.config.registry import Registry
from fedray.config.section import Fraction, PositiveInt, Section
from fedray.errors import DataError
from fedray.types import Task

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

UNASSIGNED = -1
"""Stratum of an example that is assigned to no client."""
ROUNDING = 1e-6


class ExampleColumns(Protocol):
    """What a partitioner sees of the checked examples, row by row."""

    @property
    def task(self) -> Task:
        """What is learned from the examples."""

    @property
    def column_names(self) -> list[str]:
        """Names of the source's own columns."""

    def __len__(self) -> int:
        """Return the number of examples, of all splits together."""

    def values(self, column: str) -> npt.NDArray[np.str_]:
        """Return a column of the source as text; without one of that name, as `field`.

        Raises:
            DataError: no such column.
        """

    def field(self, name: str) -> npt.NDArray[np.str_]:
        """Return a common column as text: `split`, `file`, `task`, and `text`, `label` or `prompt`, `answer`."""


@dataclass(frozen=True)
class Shares:
    """Clients that get a share of every stratum. A stratum is a class, a task, or simply everything.

    Whole numbers of examples are drawn from the shares; clients with fewer than the minimum then get examples of the
    largest ones.

    Attributes:
        strata: int [examples], stratum of every example; UNASSIGNED (-1) for examples that no client gets.
        shares: float [clients, strata]; every column adds up to 1.
        free: whether a client may get a few examples of a stratum in which its share is 0, to reach the minimum.
        names: name of every client, numbered where a name occurs again; default client_000, client_001, ...
    """

    strata: IntArray
    shares: FloatArray
    free: bool = True
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        clients, strata = self.shares.shape
        if not np.allclose(self.shares.sum(axis=0), 1, atol=ROUNDING) or (self.shares < 0).any():
            raise DataError("partition: in `shares` [clients, strata] every column must add up to 1, without negatives")
        if len(self.strata) and self.strata.max() >= strata:
            raise DataError(f"partition: `strata` holds {self.strata.max()}, but `shares` has {strata} columns")
        if self.names is not None and len(self.names) != clients:
            raise DataError(f"partition: {len(self.names)} `names` for {clients} clients in `shares`")

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which client may hold which stratum: bool [clients, strata]."""
        return np.ones_like(self.shares, dtype=bool) if self.free else self.shares > 0


@dataclass(frozen=True)
class NaturalClients:
    """Clients that the data itself names. Where `clients.count` asks for fewer, the largest ones are kept.

    Attributes:
        values: text [examples], the client of every example; empty where there is none, which is allowed only for all
            examples of a validation or test split.
        origin: what the clients are, in messages, for example `the files`.
    """

    values: npt.NDArray[np.str_]
    origin: str


class PartitionConfig(Section):
    """The common fields of all partitioners, and their contract."""

    kind: str | None = None
    """Name of a built-in partitioner, default `iid`: how examples are assigned to clients, each to exactly one."""
    class_: str | None = Field(default=None, alias="class")
    """`module.Class` of a partitioner of your own, instead of `kind`."""
    min_examples: PositiveInt = 4
    """Fewest training examples that every client must get."""
    validation_fraction: Fraction = 0.15
    """Share of each client's training examples kept for validation where the source has no validation split."""
    test_fraction: Fraction = 0.25
    """Share of each client's examples kept for testing where the source has no test split."""
    source_splits: Literal["alike", "independent", "pooled"] = "alike"
    """How validation and test splits that the source itself has are assigned by partitioners that draw shares. `alike`:
    each class, task or column value in the proportions of the clients' training examples. `independent`: by a draw of
    their own, so that a client's test classes are not those that it trains on (what the published code of FedSA-LoRA
    does). `pooled`: one draw for training, validation and test examples together, which share its skew up to chance
    (FedHFT)."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return PARTITIONERS.named(cls, value)

    @property
    def name(self) -> str:
        """The built-in name or the class: names the partitioner in messages, and keys its random draws."""
        return self.kind or self.class_ or ""

    def required_count(self, num_clients: int | None) -> int:
        """Return the number of clients, for partitioners that need one.

        Raises:
            DataError: there is none.
        """
        if num_clients is None:
            raise DataError(f"clients.count: the partition `{self.name}` needs the number of clients")
        return num_clients

    @abstractmethod
    def assign(
        self, examples: ExampleColumns, train: IntArray, num_clients: int | None, rng: np.random.Generator
    ) -> Shares | NaturalClients:
        """Return how the examples are assigned to clients: by shares of strata, or to the clients that the data names.

        Drawing whole numbers, minima, validation and test splits are common to all partitioners and happen afterwards.
        Shares are drawn again, with another `rng`, while a client gets fewer examples than the minimum.

        Args:
            examples: of all splits, in an order that depends on their content alone.
            train: rows of the training examples; with another `source_splits`, also of other splits. A value that only
                other rows have must make no client or stratum.
            num_clients: `clients.count`.
            rng: the only source of randomness.

        Raises:
            DataError: a column is missing, or the number of clients is missing or does not fit.
        """


PARTITIONERS = Registry("partitioner", "fedray.data.partitions", PartitionConfig, key="kind", default="iid")  # type: ignore[type-abstract]
AnyPartitioner = Annotated[SerializeAsAny[PartitionConfig], BeforeValidator(PARTITIONERS.parse)]
"""A configured partitioner of any class."""
