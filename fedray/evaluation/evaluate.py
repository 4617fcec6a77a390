"""Loss and metrics of a model over one table of examples.

Examples are batched by length, so a result depends neither on their order nor (up to float rounding) on the batch size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn
from torch.nn.utils import parametrize

from fedray.config import Metric
from fedray.data.batches import batches
from fedray.data.shards import GROUP
from fedray.errors import ConfigError, choices
from fedray.evaluation.losses import Scored, num_units, prompts, score
from fedray.evaluation.metrics import check_metric, generates_text
from fedray.models.checks import reads_left_padding
from fedray.types import Evaluation, Task

Device = torch.device | str


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; transformers' tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


def evaluate(
    model: nn.Module,
    table: pa.Table,
    task: Task,
    metrics: Sequence[Metric],
    batch_size: int,
    pad_token_id: int,
    device: Device,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 32,
    end_token_ids: Sequence[int] = (),
    generating: bool = True,
) -> Evaluation:
    """Return the mean loss (per example; per answer token for causal_lm), the metrics, and the number of examples: of
    the whole table, and of its groups where it has the column `group`.

    Loss and metrics of an empty table are nan. The model's training mode is as before on return.

    Args:
        tokenizer: for metrics of texts, which compare greedily generated text with the column `answer`.
        max_new_tokens: at most this many tokens are generated per example.
        end_token_ids: tokens that end a generated text.
        generating: whether text is generated for metrics of texts, which are nan otherwise.

    Raises:
        ConfigError: a metric does not fit the task, or needs a tokenizer that was not given.
    """
    for metric in metrics:
        check_metric(metric, task)
    generating = generating and generates_text(metrics)
    if generating and tokenizer is None:
        texts = choices(repr(metric.label) for metric in metrics if metric.reads == "texts")
        raise ConfigError(f"evaluation.metrics: {texts} compares generated text and needs a tokenizer; none was given")
    if table.num_rows == 0:
        return unmeasured(metrics)
    generated = None
    with evaluating(model):
        units = _score_all(model, table, task, batch_size, pad_token_id, device)
        if tokenizer is not None and generating:
            generated = generate(
                model, table, tokenizer, batch_size, pad_token_id, device, max_new_tokens, end_token_ids
            )
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


def generate(
    model: nn.Module,
    table: pa.Table,
    tokenizer: Tokenizer,
    batch_size: int,
    pad_token_id: int,
    device: Device,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
) -> list[str]:
    """Return the greedy continuation of each example's prompt (see `prompts`) up to a token that ends it, in the
    table's order.

    A model that reads padding on the left gets one prompt at a time.
    """
    batch_size = 1 if reads_left_padding(model) else batch_size
    prompt_ids = pa.array(prompts(table), pa.list_(pa.int32()))
    prompt_table = pa.table({"input_ids": prompt_ids, "labels": prompt_ids})
    order = by_length(prompt_table)
    texts = [""] * len(order)
    start = 0
    for batch in batches(prompt_table, batch_size, pad_token_id, order, device, left_pad=True):
        width = batch["input_ids"].shape[1]
        tokens = model.generate(  # type: ignore[operator]  # a transformers PreTrainedModel
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad_token_id,
            eos_token_id=list(end_token_ids) or None,
        )
        for row, answer in zip(order[start : start + len(tokens)], tokens[:, width:].tolist(), strict=True):
            ending = next((i for i, token in enumerate(answer) if token in end_token_ids), len(answer))
            texts[row] = tokenizer.decode(answer[:ending], skip_special_tokens=True)
        start += len(tokens)
    return texts


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


def by_length(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the order with the longest example first: a batch that does not fit into memory fails at once."""
    return np.argsort(-lengths(table), kind="stable")


def lengths(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return each example's number of tokens."""
    found: npt.NDArray[np.int64] = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    return found


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
