"""Loss and metric of a model over one table of examples.

Examples are batched by length, so a result depends neither on their order nor (up to float rounding) on the batch size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn
from torch.nn.utils import parametrize

from fedray.config import Metric
from fedray.data.batches import batches, by_length
from fedray.errors import ConfigError
from fedray.evaluation.generation import Decoding, generate
from fedray.evaluation.losses import Scored, score
from fedray.evaluation.metrics import check_metric
from fedray.randomness import Key
from fedray.types import Evaluation, Task

Device = torch.device | str


def evaluate(
    model: nn.Module,
    table: pa.Table,
    task: Task,
    metric: Metric,
    batch_size: int,
    pad_token_id: int,
    device: Device,
    decoding: Decoding | None = None,
    generating: bool = True,
    key: Sequence[Key] = (),
) -> Evaluation:
    """Return the mean loss (per example; per answer token for causal_lm), the metric, and the number of examples.

    An empty table gives Evaluation(nan, nan, 0). The model's training mode is as before on return.

    Args:
        decoding: for a metric of texts, which compares generated text with the column `answer`.
        generating: whether text is generated for a metric of texts, which is nan otherwise.
        key: of the table, for sampled text (`Decoding.draws`).

    Raises:
        ConfigError: the metric does not fit the task, or needs a tokenizer that was not given.
    """
    check_metric(metric, task)
    generating = generating and metric.reads == "texts"
    if generating and decoding is None:
        raise ConfigError(
            f"evaluation.metric: {metric.label!r} compares generated text and needs a tokenizer; none was given"
        )
    if table.num_rows == 0:
        return Evaluation(float("nan"), float("nan"), 0)
    with evaluating(model):
        units = _score_all(model, table, task, batch_size, pad_token_id, device)
        texts = None
        if decoding is not None and generating:
            texts = generate(model, table, decoding, batch_size, pad_token_id, device, key)
    return summarise(units, metric, table, texts)


@dataclass(frozen=True)
class Units:
    """The scored units of a table, in the order in which they were scored; [units] each."""

    losses: npt.NDArray[np.float32]
    predictions: npt.NDArray[Any]
    """Classes, tokens, or numbers."""
    labels: npt.NDArray[Any]


def summarise(units: Units, metric: Metric, table: pa.Table, texts: Sequence[str] | None = None) -> Evaluation:
    """Return the evaluation of a scored table that is not empty.

    Args:
        texts: generated for each example of the table; None makes a metric of texts nan.
    """
    if metric.reads == "texts":
        value = float("nan") if texts is None else metric.compute(texts, table["answer"].to_pylist())
    else:
        value = metric.compute(*((units.losses,) if metric.reads == "losses" else (units.predictions, units.labels)))
    return Evaluation(float(units.losses.mean(dtype=np.float64)), value, table.num_rows)


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
