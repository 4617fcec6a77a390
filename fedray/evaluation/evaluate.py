"""Loss and metrics of a model over one table of examples.

Examples are batched by length, so a result depends neither on their order nor (up to float rounding) on the batch size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from fedray.evaluation.losses import Scored, num_units, score
from fedray.evaluation.metrics import check_metric, generates_text
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
) -> Evaluation:
    """Return the mean loss (per example; per answer token for causal_lm), the metrics, and the number of examples: of
    the whole table, and of its groups where it has the column `group`.

    Loss and metrics of an empty table are nan. The model's training mode is as before on return.

    Args:
        decoding: for metrics of texts, which compare generated text with the column `answer`.
        generating: whether text is generated for metrics of texts, which are nan otherwise.
        key: of the table, for sampled text (`Decoding.draws`).

    Raises:
        ConfigError: a metric does not fit the task, or needs a tokenizer that was not given.
    """
    for metric in metrics:
        check_metric(metric, task)
    generating = generating and generates_text(metrics)
    if generating and decoding is None:
        texts = choices(repr(metric.label) for metric in metrics if metric.reads == "texts")
        raise ConfigError(f"evaluation.metrics: {texts} compares generated text and needs a tokenizer; none was given")
    if table.num_rows == 0:
        return unmeasured(metrics)
    generated = None
    with evaluating(model):
        units = _score_all(model, table, task, batch_size, pad_token_id, device)
        if decoding is not None and generating:
            generated = generate(model, table, decoding, batch_size, pad_token_id, device, key)
    return summarise(units, metrics, table, task, generated)


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

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Units":
        """Return the chosen units."""
        return Units(self.losses[chosen], self.predictions[chosen], self.labels[chosen])


def summarise(
    units: Units, metrics: Sequence[Metric], table: pa.Table, task: Task, texts: Sequence[str] | None = None
) -> Evaluation:
    """Return the evaluation of a scored table that is not empty.

    Args:
        texts: generated for each example of the table; None makes metrics of texts nan.
    """
    references = table["answer"].to_pylist() if texts is not None else []
    found = _measured(units, metrics, table.num_rows, texts, references)
    if GROUP not in table.column_names:
        return found
    rows = by_length(table)
    example = np.repeat(rows, num_units(table, task)[rows])
    names = np.asarray(table[GROUP].to_pylist(), dtype=object)
    groups = {}
    for name in sorted(set(names)):
        own = names == name
        chosen = np.flatnonzero(own)
        own_texts = None if texts is None else [texts[row] for row in chosen]
        own_references = [references[row] for row in chosen] if texts is not None else []
        groups[name] = _measured(units.where(own[example]), metrics, len(chosen), own_texts, own_references)
    return replace(found, groups=groups)


def _measured(
    units: Units, metrics: Sequence[Metric], num_examples: int, texts: Sequence[str] | None, references: Sequence[str]
) -> Evaluation:
    def value(metric: Metric) -> float:
        if metric.reads == "texts":
            return math.nan if texts is None else metric.compute(texts, references)
        return metric.compute(*((units.losses,) if metric.reads == "losses" else (units.predictions, units.labels)))

    values = {metric.label: value(metric) for metric in metrics}
    return Evaluation(float(units.losses.mean(dtype=np.float64)), values, num_examples)


def predictions_of(scored: Scored, task: Task) -> torch.Tensor:
    """Return the predicted classes, tokens or numbers, [units]."""
    return scored.outputs if task == "regression" else scored.outputs.argmax(-1)


def _score_all(
    model: nn.Module, table: pa.Table, task: Task, batch_size: int, pad_token_id: int, device: Device
) -> Units:
    """Score a whole table."""
    losses, predictions, labels = [], [], []
    for batch in batches(table, batch_size, pad_token_id, by_length(table), device):
        scored = score(model, batch, task)
        losses.append(scored.losses)
        predictions.append(predictions_of(scored, task))
        labels.append(scored.labels)
    return Units(*(torch.cat(parts).cpu().numpy() for parts in (losses, predictions, labels)))


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
