"""Texts that a language model generates for the prompts of one table of examples.

transformers' `generate` runs the model and keeps its cache, so every family that it knows can be decoded. What decides
a token is fedray's configuration alone (`Decoding`), not the model's own generation_config, and is the same for an
example whatever batch it is in:

- Prompts are padded on the left, and penalties of repeated tokens do not read the padding.
- Sampling draws the t-th token of an example by one number u_t that is keyed by the example: the first token whose
  cumulative probability exceeds u_t.
- A text ends at the first end token or stop string that it contains, wherever generation stopped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fedray.config import GenerationSection
from fedray.data.batches import batches_by_length
from fedray.evaluation.losses import prompts
from fedray.models.checks import reads_left_padding
from fedray.models.observing import unobserved
from fedray.randomness import Key, keyed_rng

TAIL = 8
"""Tokens beyond a stop string's bytes in which it is looked for after every step; some decode to nothing alone."""


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; transformers' tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class Decoding:
    """How texts are generated.

    Attributes:
        tokenizer: makes texts of tokens.
        max_new_tokens: at most this many tokens are generated per example.
        end_token_ids: tokens that end a text.
        options: the configuration's section.
        seed: keys the draws of sampling.
    """

    tokenizer: Tokenizer
    max_new_tokens: int = 32
    end_token_ids: tuple[int, ...] = ()
    options: GenerationSection = field(default_factory=GenerationSection)
    seed: int = 0

    def draws(self, key: Sequence[Key], rows: Sequence[int]) -> npt.NDArray[np.float64] | None:
        """Return the numbers in [0, 1) by which the tokens of these rows are drawn, [rows, max_new_tokens]; None:
        nothing is drawn.

        Args:
            key: of the table, such as round, client and split.
            rows: indices into the table.
        """
        if not self.options.do_sample:
            return None
        return np.array([keyed_rng(self.seed, "generate", *key, row).random(self.max_new_tokens) for row in rows])

    def text(self, tokens: Sequence[int]) -> str:
        """Return generated tokens as a text: what comes before the first end token and the first stop string."""
        ended = (
            i for i, token in enumerate(tokens) if token in self.end_token_ids or token < 0
        )  # -1: beams of unequal length
        text: str = self.tokenizer.decode(list(tokens[: next(ended, len(tokens))]), skip_special_tokens=True)
        found = [text.find(stop) for stop in self.options.stop_strings]
        return text[: min((place for place in found if place >= 0), default=len(text))]

    def stops(self, tokens: Sequence[int]) -> bool:
        """Return whether the text of generated tokens contains a stop string near its end."""
        tail = TAIL + max(len(stop.encode()) for stop in self.options.stop_strings)
        return self._contains_stop(tokens[-tail:]) and (len(tokens) <= tail or self._contains_stop(tokens))

    def _contains_stop(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return any(stop in text for stop in self.options.stop_strings)


def generate(
    model: nn.Module,
    table: pa.Table,
    decoding: Decoding,
    batch_size: int,
    pad_token_id: int,
    device: torch.device | str,
    key: Sequence[Key] = (),
) -> list[str]:
    """Return the continuation of each example's prompt (see `prompts`), in the table's order; arguments as of
    `continue_prompts`."""
    return continue_prompts(model, prompts_alone(table), decoding, batch_size, pad_token_id, device, key)


def continue_prompts(
    model: nn.Module,
    prompt_table: pa.Table,
    decoding: Decoding,
    batch_size: int,
    pad_token_id: int,
    device: torch.device | str,
    key: Sequence[Key] = (),
) -> list[str]:
    """Return the continuation of each prompt, in the table's order.

    A model that reads padding on the left gets one prompt at a time.

    Args:
        prompt_table: the prompts' tokens, in the column `input_ids`.
        key: of the table, for sampling (`Decoding.draws`).
    """
    batch_size = 1 if reads_left_padding(model) else batch_size
    texts = [""] * prompt_table.num_rows
    for rows, batch in batches_by_length(prompt_table, batch_size, pad_token_id, device, left_pad=True):
        found = generate_batch(model, batch, decoding, pad_token_id, decoding.draws(key, rows))
        for row, text in zip(rows, found, strict=True):
            texts[row] = text
    return texts


def prompts_alone(table: pa.Table) -> pa.Table:
    """Return a table of the examples' prompts, in the column `input_ids`."""
    return pa.table({"input_ids": pa.array(prompts(table), pa.list_(pa.int32()))})


def generate_batch(
    model: nn.Module,
    batch: dict[str, Tensor],
    decoding: Decoding,
    pad_token_id: int,
    draws: npt.NDArray[np.float64] | None = None,
    real: Tensor | None = None,
) -> list[str]:
    """Return the continuation of each prompt of one batch.

    Args:
        batch: `input_ids` and `attention_mask`, [prompts, tokens], padded on the left.
        draws: of `Decoding.draws`, if tokens are drawn.
        real: boolean [prompts], False at rows that only fill up the batch, whose texts mean nothing; None: there are
            none.
    """
    options, (_, width) = decoding.options, batch["input_ids"].shape
    starts = (batch["attention_mask"] != 0).int().argmax(1).repeat_interleave(options.num_beams)
    searched = {name: getattr(options, name) for name in ("length_penalty", "early_stopping")}
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=options.num_beams,
        pad_token_id=pad_token_id,
        eos_token_id=list(decoding.end_token_ids) or None,
        **(searched if options.num_beams > 1 else {}),
    )
    endings: list[StoppingCriteria] = [_StopStrings(decoding, width)] if options.stop_strings else []
    if real is not None:
        endings.append(_FillingRows(~real))
    drawn = None if draws is None else torch.from_numpy(draws).to(starts.device)
    with _without_preferences(model), unobserved():
        tokens = model.generate(  # type: ignore[operator]  # a transformers PreTrainedModel
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            logits_processor=processors(options, starts, width, drawn),
            stopping_criteria=StoppingCriteriaList(endings),
        )
    return [decoding.text(answer) for answer in tokens[:, width:].tolist()]


@contextmanager
def _without_preferences(model: Any) -> Iterator[None]:
    """Hide the model's own generation_config, from which `generate` takes whatever it is not told."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def processors(options: GenerationSection, starts: Tensor, width: int, draws: Tensor | None) -> LogitsProcessorList:
    """Return what changes the scores of the next token, in transformers' order.

    Args:
        starts: where each row's prompt begins, [rows].
        width: of the padded prompts.
        draws: of `Decoding.draws`, if tokens are drawn.
    """
    found: list[LogitsProcessor] = []
    if options.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty, prompt_ignore_length=starts))
    if options.no_repeat_ngram_size:
        found.append(_NoRepeatNGram(options.no_repeat_ngram_size, starts))
    if draws is not None:
        if options.temperature != 1:
            found.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k is not None:
            found.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            found.append(TopPLogitsWarper(options.top_p))
        found.append(_KeyedDraw(draws, width))
    return LogitsProcessorList(found)


class _NoRepeatNGram(NoRepeatNGramLogitsProcessor):  # type: ignore[misc]
    """transformers' own, without the n-grams of padding: the padding token may be the end token.

    Args:
        starts: where each row's prompt begins, [rows].
    """

    def __init__(self, ngram_size: int, starts: Tensor):
        super().__init__(ngram_size)
        self._starts = starts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        padding = torch.arange(input_ids.shape[1], device=input_ids.device) < self._starts[:, None]
        banned: Tensor = super().__call__(input_ids.masked_fill(padding, scores.shape[-1]), scores)
        return banned


class _KeyedDraw(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the drawn token, which the greedy choice then takes.

    Args:
        draws: numbers in [0, 1), float64 [rows, most new tokens].
        width: of the padded prompts.
    """

    def __init__(self, draws: Tensor, width: int):
        self._draws, self._width = draws, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
        total = cumulative[:, -1:]
        aim = self._draws[:, input_ids.shape[1] - self._width, None] * total
        aim = torch.minimum(aim, torch.nextafter(total, torch.zeros_like(total)))  # rounding: never beyond the last
        drawn = torch.searchsorted(cumulative, aim, right=True)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose generated text contains a stop string.

    Args:
        width: of the padded prompts.
    """

    def __init__(self, decoding: Decoding, width: int):
        self._decoding, self._width = decoding, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        generated = input_ids[:, self._width :].tolist()
        return torch.tensor([self._decoding.stops(tokens) for tokens in generated], device=input_ids.device)


class _FillingRows(StoppingCriteria):  # type: ignore[misc]
    """Ends rows with their first token.

    Args:
        ended: boolean [prompts]; every prompt may have several candidates.
    """

    def __init__(self, ended: Tensor):
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._ended.repeat_interleave(len(input_ids) // len(self._ended))
