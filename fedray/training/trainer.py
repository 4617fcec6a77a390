"""One client in one round: trains, evaluates, and reports. Implements `fedray.methods.protocol.Local`.

Every draw is keyed by (seed, purpose, round, client), so a client's result does not depend on who trained before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedray.adapters.adapter import Adapter
from fedray.aggregation.low_rank import LowRank
from fedray.data.shards import Shard
from fedray.errors import TrainingError
from fedray.evaluation.evaluate import evaluate
from fedray.randomness import Key, keyed_rng
from fedray.training.engine import Engine
from fedray.training.features import features
from fedray.training.importance import fisher_importance
from fedray.training.loop import Train, Trained, check_call, train_steps
from fedray.training.steering import Steering
from fedray.training.training_context import TrainingContext
from fedray.training.weight_gradients import weight_gradients
from fedray.types import COMMON, Client, Evaluation, Moment, Split, Vector

Result = TypeVar("Result")


class ClientReport(NamedTuple):
    """What one client's round is recorded with.

    Attributes:
        steps: optimizer steps of all trainings.
        train_loss: mean over the optimizer steps (nan before training).
        seconds: of local training, without evaluation.
        evaluations: what was measured, by moment and by the name of the examples (`test`, `validation`, `common`).
            `aggregated` is right before the first training, `personalised` right after the last measured one, or at
            `measure`; `server` is `aggregated` for the one client that evaluates the server's model.
        recorded: further columns of the client's row, by name.
    """

    steps: int
    train_loss: float
    seconds: float
    evaluations: Mapping[str, Mapping[str, Evaluation]]
    recorded: Mapping[str, float | Sequence[float]]

    def evaluation(self, moment: str, examples: str = "test") -> Evaluation | None:
        """Return an evaluation, or None if it was not measured."""
        return self.evaluations.get(moment, {}).get(examples)


class MeasuredOnly(Exception):
    """Ends `train_client` where the client's first training would begin, in a pass that measures nothing after it."""


class ClientBackend(Protocol):
    """Computes a client's training and evaluations: with an engine (`EngineBackend`), or as part of a client batch
    (`fedray.training.batched`)."""

    @property
    def adapter(self) -> Adapter:
        """What the client's method loads and reads."""
        ...

    def train(self, request: Train) -> Trained:
        """Train the adapter as requested."""
        ...

    def evaluate(self, table: pa.Table, generating: bool, key: Sequence[Key], each: bool = False) -> Evaluation:
        """Evaluate the adapter as it is loaded now; see `evaluate_client`."""
        ...

    def importance(self, table: pa.Table) -> dict[str, npt.NDArray[np.float64]]:
        """Return the Fisher information of each target layer's outputs over the examples, by module path."""
        ...

    def compute(self, function: Callable[[Adapter], Result]) -> Result:
        """Return what the function returns, given an adapter with the client's values whose model computes for this
        client alone."""
        ...


@dataclass(frozen=True)
class EngineBackend:
    """One client at a time."""

    engine: Engine
    training_context: TrainingContext

    @property
    def adapter(self) -> Adapter:
        return self.engine.adapter

    def train(self, request: Train) -> Trained:
        return train_steps(self.engine, request, self.training_context)

    def evaluate(self, table: pa.Table, generating: bool, key: Sequence[Key], each: bool = False) -> Evaluation:
        asked = generating, key, each
        return self.compute(lambda adapter: evaluate_client(adapter, table, self.training_context, *asked))

    def compute(self, function: Callable[[Adapter], Result]) -> Result:
        return self.engine.process_group.from_first(lambda: function(self.adapter))

    def importance(self, table: pa.Table) -> dict[str, npt.NDArray[np.float64]]:
        training_context = self.training_context
        return self.compute(
            lambda adapter: fisher_importance(
                adapter,
                table,
                training_context.task,
                training_context.train.batch_size,
                training_context.pad_token_id,
                training_context.device,
            )
        )


def evaluate_client(
    adapter: Adapter,
    table: pa.Table,
    training_context: TrainingContext,
    generating: bool = True,
    key: Sequence[Key] = (),
    each: bool = False,
) -> Evaluation:
    """Evaluate the adapter's model as it computes now. Without `generating`, a metric of generated text is nan; sampled
    text is keyed by `key`; `each` adds every example's values."""
    return evaluate(
        adapter.model,
        table,
        training_context.task,
        training_context.metrics,
        training_context.evaluation.batch_size,
        training_context.pad_token_id,
        training_context.device,
        training_context.decoding,
        generating,
        key,
        each,
    )


class LocalTrainer:
    """Trains, evaluates and reports for one client in one round.

    Args:
        backend: computes training and evaluations.
        shard: the client's examples.
        client: whose round it is.
        server_round: counts from 0.
        training_context: what all clients share.
        measures: whether the test and the validation split are evaluated before and after training.
        measures_server: whether the server's model is evaluated on the common test set before training.
        each: whether what is measured has every example's values.
        trains: whether clients train at all; without, the first call of `train` measures and raises `MeasuredOnly`.
    """

    def __init__(
        self,
        backend: ClientBackend,
        shard: Shard,
        client: Client,
        server_round: int,
        training_context: TrainingContext,
        measures: bool,
        measures_server: bool = False,
        each: bool = False,
        trains: bool = True,
    ) -> None:
        self.client = client
        self.server_round = server_round
        self.seed = training_context.seed
        self._backend = backend
        self._shard = shard
        self._training_context = training_context
        self.measures = measures
        self._measures_server, self._each, self._trains = measures_server, each, trains
        self._losses: list[float] = []
        self._seconds = 0.0
        self._trainings = 0
        self._evaluations: dict[str, Mapping[str, Evaluation]] = {}
        self._recorded: dict[str, float | Sequence[float]] = {}

    @property
    def report(self) -> ClientReport:
        """What has been trained, measured and recorded so far."""
        return ClientReport(
            steps=len(self._losses),
            train_loss=float(np.mean(self._losses)) if self._losses else float("nan"),
            seconds=self._seconds,
            evaluations=dict(self._evaluations),
            recorded=dict(self._recorded),
        )

    def train(
        self,
        parts: Sequence[str] | None = None,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        steering: Steering | None = None,
        phase: int | None = None,
        measure: bool = True,
        mean_gradient: bool = False,
    ) -> Mapping[str, Vector]:
        """See `Local.train`.

        Raises:
            ConfigError: the engine cannot train parts, or steer.
            KeyError: a part or a steering's vector that the adapter does not have.
            TrainingError: no training examples, nothing to train, arguments that contradict each other or what trains,
                or a loss or a parameter that is not finite.
            MeasuredOnly: nothing is to be trained.
        """
        self._check_examples()
        check_call(self._backend.adapter, parts, epochs, steps, steering, mean_gradient)
        if self.measures and self._trainings == 0:
            self._measure("aggregated", self._on("test"))
        if not self._trains:
            raise MeasuredOnly
        trained = self._backend.train(
            Train(
                self._shard.tables["train"],
                self.client.id,
                self.server_round,
                parts=None if parts is None else tuple(parts),
                epochs=epochs,
                steps=steps,
                phase=self._trainings if phase is None else phase,
                steering=steering,
                mean_gradient=mean_gradient,
            )
        )
        self._trainings += 1
        self._losses += trained.losses
        self._seconds += trained.seconds
        if measure:
            self.measure()
        return trained.mean_gradient

    def measure(self) -> None:
        """See `Local.measure`."""
        if self.measures and self._trains:
            self._backend.adapter.observed()  # drops what earlier evaluations left there
            on_test = self._on("test")
            for name, mean in self._backend.adapter.observed().items():
                self.record(name, mean)
            self._measure("personalised", on_test)

    def _measure(self, moment: Moment, on_test: Evaluation) -> None:
        """Keep an evaluation on the test examples, and add those on the validation examples, by which models are
        selected, and on the common test set."""
        found = {"test": on_test}
        if self._shard.num_examples("validation"):
            found["validation"] = self._on("validation")
        context, server = self._training_context, moment == "aggregated" and self._measures_server
        if context.common is not None and (server or moment in context.common_moments):
            on_common = self._backend.evaluate(context.common, True, (self.server_round, COMMON), self._each)
            if server:
                self._evaluations["server"] = {COMMON: on_common}
            if moment in context.common_moments:
                found[COMMON] = on_common
        self._evaluations[moment] = found

    def _on(self, split: Split) -> Evaluation:
        """Evaluate the adapter for the report."""
        return self._backend.evaluate(self._shard.tables[split], True, self._key(split), self._each)

    def evaluate(self, split: Split, *, generating: bool = False) -> Evaluation:
        """Evaluate the adapter as it is loaded now; loss and metrics of an empty split are nan."""
        return self._backend.evaluate(self._shard.tables[split], generating, self._key(split))

    def _key(self, split: Split) -> tuple[Key, ...]:
        return self.server_round, self.client.id, split

    def importance(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the Fisher information of each target layer's outputs over the training examples, by module path."""
        return self._backend.importance(self._shard.tables["train"])

    def features(self, split: Split, rows: Sequence[int]) -> Vector:
        """Return the last hidden state of each example's last prompt token, [rows, d]."""
        table = self._shard.tables[split].take(np.asarray(rows, np.int64))
        return self._backend.compute(lambda adapter: features(adapter, table, self._training_context))

    def weight_gradients(self, rank: int, max_examples: int) -> dict[str, LowRank]:
        """Return the gradient of the mean training loss with respect to each target layer's weight, by module path.

        Raises:
            TrainingError: no training examples.
        """
        self._check_examples()
        table = self._shard.tables["train"].slice(0, max_examples)
        return self._backend.compute(lambda adapter: weight_gradients(adapter, table, rank, self._training_context))

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator keyed by (seed, purpose, round, client)."""
        return keyed_rng(self._training_context.seed, purpose, self.server_round, self.client.id)

    def record(self, name: str, value: float | Sequence[float]) -> None:
        """Add a column to this client's row of the report; the last value of a name stays."""
        self._recorded[name] = value

    def _check_examples(self) -> None:
        if self._backend.adapter.num_trainable() == 0:
            raise TrainingError(
                f"client {self.client.id!r}: the adapter has no trainable group; the method's attach() must call "
                "set_trainable() with what trains"
            )
        if self._shard.num_examples() == 0:
            raise TrainingError(
                f"client {self.client.id!r} has no training examples; raise partition.min_examples, "
                "or lower partition.validation_fraction and partition.test_fraction"
            )
