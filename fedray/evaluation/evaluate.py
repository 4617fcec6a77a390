"""Loss and metrics of a model over one table of examples.

Examples are batched by length, so a result depends neither on their order nor (up to float rounding) on the batch size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn
from torch.nn.utils import parametrize

from fedray.config import Metric
from fedray.data.batches import batches, by_length
from fedray.data.shards import GROUP
from fedray.errors import ConfigError, choices
from fedray.evaluation.generation import Decoding, generate
from fedray.evaluation.losses import num_units, score
from fedray.evaluation.metrics import check_metric, generates_text
from fedray.evaluation.options import by_example, has_options, log_likelihoods, options_of
from fedray.randomness import Key
from fedray.types import Evaluation, Task

Device = torch.device | str


def evaluate(
    model: nn.Module,
    table: pa.Table,
    task: Task,
    metrics: Sequence[Metric],
    batch_size: int,
    pad_token_id: int,
    device: Device,
    decoding: Decoding | None = None,
    generating: bool = True,
    key: Sequence[Key] = (),
    each: bool = False,
) -> Evaluation:
    """Return the mean loss (per example; per answer token for causal_lm), the metrics, and the number of examples: of
    the whole table, and of its groups where it has the column `group`.

    Loss and metrics of an empty table are nan. The model's training mode is as before on return.

    Args:
        decoding: for metrics of texts, which compare generated text with the column `answer`.
        generating: whether text is generated for metrics of texts, and options are scored for metrics of likelihoods,
            which are nan otherwise. The latter also are where the table has no column `choices`.
        key: of the table, for sampled text (`Decoding.draws`).
        each: whether every example's values are returned as well.

    Raises:
        ConfigError: a metric does not fit the task, or needs a tokenizer that was not given.
    """
    for metric in metrics:
        check_metric(metric, task)
    ranking = generating and has_options(table, metrics)
    generating = generating and generates_text(metrics)
    if generating and decoding is None:
        texts = choices(repr(metric.label) for metric in metrics if metric.reads == "texts")
        raise ConfigError(f"evaluation.metrics: {texts} compares generated text and needs a tokenizer; none was given")
    if table.num_rows == 0:
        return unmeasured(metrics)
    generated = likelihoods = None
    with evaluating(model):
        units = _score_all(model, table, task, batch_size, pad_token_id, device)
        if decoding is not None and generating:
            generated = generate(model, table, decoding, batch_size, pad_token_id, device, key)
        if ranking:
            options = options_of(table)
            scored = _score_all(model, options, task, batch_size, pad_token_id, device)
            likelihoods = log_likelihoods(scored.losses, options)
    return summarise(units, metrics, table, task, generated, likelihoods, each)


def unmeasured(metrics: Sequence[Metric]) -> Evaluation:
    """Return the evaluation of no examples."""
    return Evaluation(math.nan, {metric.label: math.nan for metric in metrics}, 0)


@dataclass(frozen=True)
class Units:
    """The scored units of a table, with its examples in the order of `by_length`; [units] each."""

    losses: npt.NDArray[np.float32]
    predictions: npt.NDArray[Any]
    """Classes, tokens, or numbers."""
    labels: npt.NDArray[Any]

    def where(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "Units":
        """Return the chosen units."""
        return Units(self.losses[chosen], self.predictions[chosen], self.labels[chosen])


def summarise(
    units: Units,
    metrics: Sequence[Metric],
    table: pa.Table,
    task: Task,
    texts: Sequence[str] | None = None,
    likelihoods: npt.NDArray[np.float64] | None = None,
    each: bool = False,
) -> Evaluation:
    """Return the evaluation of a scored table that is not empty.

    Args:
        texts: generated for each example of the table; None makes metrics of texts nan.
        likelihoods: of the options of all examples (`log_likelihoods`); None makes metrics of them nan.
        each: whether every example's values are returned as well.
    """
    measured = _Measured(units, table, task, texts, likelihoods)
    found = measured.whole(metrics)
    if GROUP in table.column_names:
        names = np.asarray(table[GROUP].to_pylist(), dtype=object)
        groups = {name: measured.of(np.flatnonzero(names == name), metrics) for name in sorted(set(names))}
        found = replace(found, groups=groups)
    return replace(found, examples=measured.examples(metrics)) if each else found


class _Measured:
    """A scored table.

    Args:
        units: with its examples in the order of `by_length`.
        texts: generated for each example; None if none were.
        likelihoods: of all options; None if none were scored.
    """

    def __init__(
        self,
        units: Units,
        table: pa.Table,
        task: Task,
        texts: Sequence[str] | None,
        likelihoods: npt.NDArray[np.float64] | None,
    ):
        self._units, self._table, self._task, self._texts = units, table, task, texts
        self._references = table["answer"].to_pylist() if texts is not None else []
        self._options = None if likelihoods is None else by_example(table, likelihoods)

    @cached_property
    def _example(self) -> npt.NDArray[np.int64]:
        """The row of each unit; most tables are evaluated as a whole, and do not need it."""
        rows = by_length(self._table)
        found: npt.NDArray[np.int64] = np.repeat(rows, num_units(self._table, self._task)[rows])
        return found

    def whole(self, metrics: Sequence[Metric]) -> Evaluation:
        """Return the evaluation of all rows."""
        return self._evaluation(self._units, np.arange(self._table.num_rows), metrics)

    def of(self, rows: npt.NDArray[np.int64], metrics: Sequence[Metric]) -> Evaluation:
        """Return the evaluation of some rows."""
        return self._evaluation(self._units.where(np.isin(self._example, rows)), rows, metrics)

    def examples(self, metrics: Sequence[Metric]) -> dict[str, list[Any]]:
        """Return every example's values, in the table's order."""
        kept = [metric for metric in metrics if metric.of_one_example]
        order = np.argsort(self._example, kind="stable")
        ends = np.cumsum(np.bincount(self._example, minlength=self._table.num_rows))[:-1]
        alone = [
            self._evaluation(self._units.where(own), np.array([row]), kept)
            for row, own in enumerate(np.split(order, ends))
        ]
        found: dict[str, list[Any]] = {"loss": [one.loss for one in alone]}
        found |= {metric.label: [one.metrics[metric.label] for one in alone] for metric in kept}
        if self._texts is not None:
            found["text"] = list(self._texts)
        if self._task != "causal_lm":
            found["prediction"] = self._units.predictions[order].tolist()
        return found

    def _evaluation(self, units: Units, rows: npt.NDArray[np.int64], metrics: Sequence[Metric]) -> Evaluation:
        def value(metric: Metric) -> float:
            if metric.reads == "losses":
                return metric.compute(units.losses)
            if metric.reads == "predictions":
                return metric.compute(units.predictions, units.labels)
            if metric.reads == "likelihoods":
                read: Sequence[Sequence[Any]] | None = self._options
            else:
                read = None if self._texts is None else (self._texts, self._references)
            return math.nan if read is None else metric.compute(*([side[row] for row in rows] for side in read))

        values = {metric.label: value(metric) for metric in metrics}
        return Evaluation(float(units.losses.mean(dtype=np.float64)), values, len(rows))


def score_units(
    model: nn.Module, batch: Mapping[str, torch.Tensor], task: Task
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a batch's losses, predictions (classes, tokens or numbers) and labels, [units] each. The logits, which may
    be larger than the model, do not outlive the call."""
    scored = score(model, batch, task)
    return scored.losses, scored.outputs if task == "regression" else scored.outputs.argmax(-1), scored.labels


def _score_all(
    model: nn.Module, table: pa.Table, task: Task, batch_size: int, pad_token_id: int, device: Device
) -> Units:
    """Score a whole table."""
    scored = [
        score_units(model, batch, task) for batch in batches(table, batch_size, pad_token_id, by_length(table), device)
    ]
    return Units(*(torch.cat(parts).cpu().numpy() for parts in zip(*scored, strict=True)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode without autograd, and compute every parametrization (LoReFT's rotation) once for all
    batches."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: an engine that gathers partitioned parameters (ZeRO-3) would make inference tensors of
        # them, and those that it keeps gathered could not be trained afterwards.
        with torch.no_grad(), parametrize.cached():
            yield
    finally:
        model.train(was_training)
