"""Options of multiple-choice examples: as examples of their own for the model, and their likelihoods by example."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedray.config import Metric
from fedray.data.batches import by_length
from fedray.data.shards import CHOICES
from fedray.evaluation.losses import num_units
from fedray.evaluation.metrics import ranks_options
from fedray.types import IGNORED


def has_options(table: pa.Table, metrics: Sequence[Metric]) -> bool:
    """Return whether the table's examples have options, and one of the metrics ranks them."""
    return CHOICES in table.column_names and ranks_options(metrics)


def options_of(table: pa.Table) -> pa.Table:
    """Return the options of all examples, one row each, as examples of causal_lm whose answer is the option."""
    options = pc.list_flatten(table[CHOICES]).combine_chunks()
    ids = pc.struct_field(options, "input_ids")
    starts, sizes = pc.struct_field(options, "start").to_numpy(), ids.value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    tokens = ids.flatten().to_numpy()
    prompt = np.arange(len(tokens)) < np.repeat(offsets[:-1] + starts, sizes)
    columns = {"input_ids": tokens, "labels": np.where(prompt, IGNORED, tokens).astype(np.int32)}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})


def log_likelihoods(losses: npt.NDArray[np.floating], options: pa.Table) -> npt.NDArray[np.float64]:
    """Return each option's log-likelihood in nats, the sum over its tokens; [options].

    Args:
        losses: of the answer tokens of `options_of`, with its rows in the order of `by_length`.
    """
    order = by_length(options)
    option = np.repeat(order, num_units(options, "causal_lm")[order])
    sums = np.bincount(option, weights=-losses.astype(np.float64), minlength=options.num_rows)
    return sums.astype(np.float64)


def by_example(
    table: pa.Table, likelihoods: npt.NDArray[np.float64]
) -> tuple[list[npt.NDArray[np.float64]], list[list[str]], list[int]]:
    """Return the log-likelihoods, texts, and right option of every example."""
    choices = table[CHOICES].to_pylist()
    ends = np.cumsum([len(options) for options in choices])[:-1]
    texts = [[option["text"] for option in options] for options in choices]
    right = [next(i for i, option in enumerate(options) if option["right"]) for options in choices]
    return np.split(likelihoods, ends), texts, right
