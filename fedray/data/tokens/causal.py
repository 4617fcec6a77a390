"""Texts that a causal language model learns, as tokens with labels.

A text is tokenised as a whole, as the model will read it, and the tokens with a loss are found by their characters. A
token on the border of prompt and answer belongs to the answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import BatchEncoding, PreTrainedTokenizerBase

from fedray.data.tokens.chat import MarkedText, Span
from fedray.models.tokenizer import end_token_id
from fedray.types import IGNORED

Ids = list[int]


@dataclass(frozen=True)
class TokenRow:
    """One example.

    Attributes:
        answer: text that generation is compared with.
        length: number of tokens before the example was cut.
        lost: number of tokens that the last answer lost.
        shared: number of the prompt's characters in the first token of the last answer.
    """

    input_ids: Ids
    labels: Ids
    answer: str
    length: int
    lost: int
    shared: int


@dataclass(frozen=True)
class _Scored:
    """A tokenised text.

    Attributes:
        spans: tokens with a loss; spans of the text that touch are one.
        start: character at which the last of them begins.
        shared: as in `TokenRow`.
    """

    ids: Ids
    spans: list[Span]
    start: int
    shared: int = 0


@dataclass(frozen=True)
class CausalEncoder:
    """Turns marked texts into tokens that fit into max_length.

    Attributes:
        begins: whether the token with which the tokenizer begins a text is added where the text lacks it.
        ends: whether the end-of-text token is added to the last answer where it lacks it.
        controls: whether the texts of special tokens stand for these tokens, even if the tokenizer says otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    begins: bool = True
    ends: bool = True
    controls: bool = False

    def __call__(self, texts: Sequence[MarkedText]) -> Iterator[TokenRow]:
        """Yield one row per text."""
        end, start = end_token_id(self.tokenizer), start_tokens(self.tokenizer)
        kept = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id}
        scored = self._whole(texts) if self.tokenizer.is_fast else map(self._apart, texts)
        for text, one in zip(texts, scored, strict=True):
            ids, spans = one.ids[: one.spans[-1][1]], one.spans  # nothing is learned from what follows the last answer
            if self.begins and ids[: len(start)] != start:
                ids, spans = _led(start, ids, spans)
            if spans[0][0] == 0:  # the model needs something to continue
                ids, spans = _led([end], ids, spans)
            first, stop = spans[-1]
            if first == stop or (self.ends and ids[-1] != end):
                ids, spans = [*ids, end], [*spans[:-1], (first, stop + 1)]
            labels = [IGNORED] * len(ids)
            for a, b in spans:
                labels[a:b] = ids[a:b]
            rows = _fitting(len(ids), first, int(ids[0] in kept), self.max_length)
            yield TokenRow(
                [ids[i] for i in rows],
                [labels[i] for i in rows],
                text.text[one.start : text.answer_end],
                length=len(ids),
                lost=len(ids) - 1 - rows[-1],
                shared=one.shared,
            )

    def _whole(self, texts: Sequence[MarkedText]) -> Iterator[_Scored]:
        """Tokenise texts as a whole, and find their spans by the characters of each token."""
        settings = {"split_special_tokens": False} if self.controls else {}
        with _untrimmed(self.tokenizer):
            encoded = self.tokenizer(
                [text.text for text in texts],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
                **settings,
            )
        for row, text in enumerate(texts):
            yield _located(encoded, row, text)

    def _apart(self, text: MarkedText) -> _Scored:
        """Tokenise what has a loss apart from the rest, for tokenizers that do not tell a token's characters."""
        ids: Ids = []
        spans = []
        inside = {start for start, _ in text.spans}
        borders = sorted({0, len(text.text), *(border for span in text.spans for border in span)})
        for start, stop in pairwise(borders):
            piece = self.tokenizer(text.text[start:stop], add_special_tokens=False, verbose=False).input_ids
            if start in inside:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        return _joined(ids, spans, text)


@contextmanager
def _untrimmed(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Switch off the post-processor, which may take the blanks out of a token's characters."""
    backend = tokenizer.backend_tokenizer
    processor, backend.post_processor = backend.post_processor, None
    try:
        yield
    finally:
        backend.post_processor = processor


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the token with which this tokenizer begins a text (bos or cls), if any."""
    first = tokenizer("").input_ids[:1]
    return [int(token) for token in first if token in (tokenizer.bos_token_id, tokenizer.cls_token_id)]


def _located(encoded: BatchEncoding, row: int, text: MarkedText) -> _Scored:
    """Return the tokens of a text's spans, with those that are only partly inside."""
    ids: Ids = encoded.input_ids[row]

    def token_at(char: int) -> int:
        """Return the first token with this character, or with one after it: no token may have a blank."""
        found = (encoded.char_to_token(row, other) for other in range(char, len(text.text)))
        return next((token for token in found if token is not None), len(ids))

    def first_char(token: int) -> int:
        return int(encoded.token_to_chars(row, token).start) if token < len(ids) else len(text.text)

    spans = []
    for start, stop in text.spans:
        first, after = token_at(start), token_at(stop)
        while after < len(ids) and first_char(after) < stop:
            after += 1
        spans.append((first, after))
    one = _joined(ids, spans, text)
    shared = max(one.start - first_char(one.spans[-1][0]), 0)
    return replace(one, start=one.start - shared, shared=shared)


def _joined(ids: Ids, spans: Sequence[Span], text: MarkedText) -> _Scored:
    """Return a tokenised text, with spans that touch made one."""
    made: list[Span] = []
    begin = 0
    for (first, stop), (char, _) in zip(spans, text.spans, strict=True):
        if made and first <= made[-1][1]:
            made[-1] = (made[-1][0], max(stop, made[-1][1]))
        else:
            made.append((first, stop))
            begin = char
    return _Scored(ids, made, begin)


def _led(first: Ids, ids: Ids, spans: Sequence[Span]) -> tuple[Ids, list[Span]]:
    """Return tokens and spans with further tokens in front."""
    return [*first, *ids], [(start + len(first), stop + len(first)) for start, stop in spans]


def _fitting(length: int, answer: int, kept: int, max_length: int) -> list[int]:
    """Return which tokens of an example are kept: of those before the last answer the last ones and the `kept` first,
    then the answer up to max_length.

    Args:
        answer: first token of the last answer.
    """
    room = max(max_length - (length - answer), max_length // 4)
    if answer > room:
        kept = min(kept, room)
        return [*range(kept), *range(answer - room + kept, length)][:max_length]
    return list(range(min(length, max_length)))
