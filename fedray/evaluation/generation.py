"""Texts that a language model generates for the prompts of one table of examples."""

from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import nn

from fedray.data.batches import batches, by_length
from fedray.evaluation.losses import prompts
from fedray.models.checks import reads_left_padding


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; transformers' tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


def generate(
    model: nn.Module,
    table: pa.Table,
    tokenizer: Tokenizer,
    batch_size: int,
    pad_token_id: int,
    device: torch.device | str,
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
