"""The loss of every task, one value per unit. A unit is an example or, for causal_lm, an answer token.

Means over units are transformers' own losses: cross-entropy (classification), squared error (regression), and
next-token cross-entropy over labels other than -100 (causal_lm).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional

from fedray.data.shards import last_answer
from fedray.models.labels import labelled
from fedray.types import IGNORED, Task


@dataclass(frozen=True)
class Scored:
    """The scored units of a batch.

    Attributes:
        losses: float32 [units].
        outputs: float32 logits [units, classes or vocabulary], or predictions [units] (regression).
        labels: [units].
    """

    losses: torch.Tensor
    outputs: torch.Tensor
    labels: torch.Tensor


def score(model: nn.Module, batch: Mapping[str, torch.Tensor], task: Task) -> Scored:
    """Return the losses of one batch.

    Args:
        batch: tensors of shape [examples, tokens]; labels as in `Shard`.
    """
    if task == "causal_lm":
        scored = _predicts_answer(batch["labels"])
        logits = logits_at(model, batch, scored).float()
        labels = batch["labels"][:, 1:][scored[:, :-1]]
        return Scored(functional.cross_entropy(logits, labels, reduction="none"), logits, labels)
    labels = batch["labels"]
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
    if task == "regression":
        predictions, labels = logits.squeeze(-1), labels.float()
        return Scored(functional.mse_loss(predictions, labels, reduction="none"), predictions, labels)
    return Scored(functional.cross_entropy(logits, labels, reduction="none"), logits, labels)


def logits_at(model: nn.Module, batch: Mapping[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """Return the logits [units, vocabulary] at the positions `where` ([examples, tokens], boolean).

    The output layer gets only those positions: with a vocabulary of 128,000 tokens the logits of a whole batch are
    larger than the model, and the prompt's are never looked at.

    Args:
        batch: tensors of shape [examples, tokens]; labels tell the prompt, and are not read otherwise.
    """

    def only_scored(_: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (args[0][where].unsqueeze(0),)

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    handle = model.get_output_embeddings().register_forward_pre_hook(only_scored)  # type: ignore[operator]
    try:
        with labelled(batch["labels"]):  # an adapter's hooks see from them where the prompt ends
            return model(**inputs, use_cache=False).logits.squeeze(0)  # type: ignore[no-any-return]
    finally:
        handle.remove()


def num_units(table: pa.Table, task: Task) -> npt.NDArray[np.int64]:
    """Return each example's number of units, shape [examples]: 1, or for causal_lm its answer tokens."""
    if task != "causal_lm":
        return np.ones(table.num_rows, dtype=np.int64)
    labels, lengths = _flat(table, "labels")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    scored = labels != IGNORED
    scored[starts[lengths > 0]] = False  # nothing predicts a text's first token
    before = np.concatenate([[0], np.cumsum(scored)])
    counts: npt.NDArray[np.int64] = before[ends] - before[starts]
    return counts


def prompts(table: pa.Table) -> list[npt.NDArray[np.int32]]:
    """Return what the model reads of each example before its last answer, the last tokens with a loss; at least one."""
    cut = []
    for tokens, labels in zip(_rows(table, "input_ids"), _rows(table, "labels"), strict=True):
        cut.append(tokens[: last_answer(labels)])
    return cut


def _rows(table: pa.Table, column: str) -> list[npt.NDArray[np.int32]]:
    """Return a list column as one view per row, through one flat array: Arrow scalars cost a microsecond per token."""
    values, lengths = _flat(table, column)
    return np.split(values, np.cumsum(lengths)[:-1]) if table.num_rows else []


def _flat(table: pa.Table, column: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the values of all rows of a list column, and each row's length."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(), lists.value_lengths().to_numpy().astype(np.int64)


def _predicts_answer(labels: torch.Tensor) -> torch.Tensor:
    """Return True at [example, t] where the next token, t + 1, has a label."""
    return functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)
