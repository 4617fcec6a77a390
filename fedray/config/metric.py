"""What a metric is, and how a configuration names one: `accuracy`, or `{class: my_metric.MyMetric, ...its fields}`.

The built-in metrics are the modules of `fedray.evaluation.metrics`, which are imported only when they are used.
The smallest metric:

    import numpy as np

    from fedray.config import Metric

    class ErrorRate(Metric):
        tasks = ("classification",)
        higher_is_better = False

        def compute(self, predictions, labels):
            return float(np.mean(predictions != labels))
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, SerializeAsAny

from fedray.config.option import Option
from fedray.config.registry import Registry
from fedray.types import Task

Reads = Literal["predictions", "losses", "texts", "likelihoods"]


class Metric(Option):
    """A number that tells how good a model is on one client's examples. Fields of a subclass are its options.

    Attributes:
        tasks: the tasks whose examples it can be computed from.
        reads: what `compute` gets. `predictions`: predictions and labels of the scored units, [units] each. A unit is
            an example, or for causal_lm an answer token. `losses`: the units' losses in nats, [units]. `texts`: the
            generated and the reference texts, two sequences of strings. `likelihoods`: for each example the
            log-likelihoods of its options in nats, [options], their texts, and the index of the right one; three
            sequences.
        higher_is_better: whether a larger value is the better one.
        percent: whether tables show it in percent.
        of_one_example: whether a single example has a value: it is then kept with `evaluation.examples`.
        proportion: whether it is a share of examples, so that its binomial error is known from their number.
        libraries: modules that `compute` imports, because importing them takes a second or more. A worker imports them
            with its method's, so that their memory counts towards the process and their time towards no client.
    """

    must_define: ClassVar[tuple[str, ...]] = ("compute",)
    tasks: ClassVar[tuple[Task, ...]] = ()
    reads: ClassVar[Reads] = "predictions"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    of_one_example: ClassVar[bool] = False
    proportion: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def registry(cls) -> Registry[Any]:
        return METRICS

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that could not be used.

        Raises:
            TypeError: it names no task, or one that does not exist; it reads something else than a metric can.
        """
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.tasks or not set(cls.tasks) <= set(get_args(Task)):
            raise TypeError(f"{cls.__name__}.tasks: expected some of {get_args(Task)}, got {cls.tasks!r}")
        if cls.reads not in get_args(Reads):
            raise TypeError(f"{cls.__name__}.reads: expected one of {get_args(Reads)}, got {cls.reads!r}")

    def compute(self, *args: Any, **kwargs: Any) -> float:
        """Return the metric of what it reads: `compute(predictions, labels)`, `compute(losses)`,
        `compute(generated, references)` or `compute(likelihoods, options, right)`. It is never called without an
        example."""
        raise NotImplementedError

    def for_classes(self, label_names: Sequence[str]) -> Self:
        """Return the metric for data with these classes, in the order of their indices. A metric with an option that
        names a class puts the index there, because `compute` sees indices only.

        Raises:
            ConfigError: the data has no such class.
        """
        return self

    def check_references(self, references: Sequence[str]) -> None:
        """Check the reference texts of a split before anything is trained (metrics of texts only).

        Raises:
            DataError: the metric cannot be computed from one of them.
        """


METRICS = Registry("metric", "fedray.evaluation.metrics", Metric)

MetricOption = Annotated[SerializeAsAny[Metric], BeforeValidator(METRICS.parse)]
"""A metric as a field of a configuration."""
