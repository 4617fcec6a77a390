"""Conversations as text, by a chat template, and which characters of it the assistant writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedray.config import DataConfig
from fedray.data.formats.turns import Turn
from fedray.data.tokens.chat_templates import CHAT_TEMPLATES
from fedray.errors import ConfigError, DataError, choices, nearest
from fedray.models.tokenizer import end_token_id

TODAY = datetime(2024, 7, 26)
"""What templates that ask for today's date get: with the real date, no run could be repeated."""

Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True)
class MarkedText:
    """A text, and what of it is learned.

    Attributes:
        spans: characters with a loss, in order; the last span is the answer that generation is compared with.
        answer_end: where the last answer ends, before the token that ends its turn.
    """

    text: str
    spans: tuple[Span, ...]
    answer_end: int


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template together with the tokens that it may write.

    The assistant's part of a text is what the template marks with `{% generation %}`. Templates without marks are
    rendered again with another text in the assistant's place: what stays the same is not the assistant's.

    Attributes:
        name: for messages.
        text: Jinja.
        tokens: special tokens by the names that templates use.
        added: texts that are one token wherever they stand.
        from_tokenizer: it came with the tokenizer, so that it writes the token that begins a text if there is one.
    """

    name: str
    text: str
    tokens: dict[str, str] = field(hash=False)
    added: tuple[str, ...]
    from_tokenizer: bool

    def render(self, turns: Sequence[Turn], context: int = 0) -> MarkedText:
        """Return a conversation that ends with an assistant turn as text.

        Args:
            context: number of leading turns without loss.

        Raises:
            DataError: the template refuses the conversation, or does not show where the assistant's turns are.
        """
        text, marks = self._render(turns)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not self._has_marks:
            spans = [self._span(turns, i, text) for i in answers if i >= context]
            return MarkedText(text, tuple((start, end) for start, end, _ in spans), spans[-1][2])
        if context:
            if len(marks) != len(answers):
                raise DataError(f"{self.name} marks {len(marks)} parts of a conversation with {len(answers)} answers")
            marks = [mark for i, mark in zip(answers, marks, strict=True) if i >= context]
        if not marks:
            raise DataError(f"{self.name} marks nothing of the conversation with {{% generation %}}")
        start, end = marks[-1]
        answer = text[start:end].rstrip().removesuffix(self.end_token or "")
        return MarkedText(text, tuple(marks), start + len(answer))

    @cached_property
    def end_token(self) -> str | None:
        """The token that ends the assistant's turns; None if the template writes none."""
        return self._tail[1] or None

    @property
    def note(self) -> str:
        """What a user should know about the template; empty if nothing."""
        if self.end_token is None:
            return (
                f"{self.name} writes no token after the assistant's turns; the end-of-text token follows the last one, "
                "and the others do not teach the model where to stop"
            )
        marked = self.render(self._probe)
        if self.end_token not in marked.text[marked.answer_end : marked.spans[-1][1]]:
            return (
                f"{self.name} leaves {self.end_token!r} out of what it marks with {{% generation %}}: the model does "
                "not learn where to stop"
            )
        return ""

    @property
    def _has_marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    def _span(self, turns: Sequence[Turn], i: int, text: str) -> tuple[int, int, int]:
        """Return where turn i begins, ends, and where its content ends.

        It begins where the generation prompt would end, or where its content does, if the template has no such prompt
        or changes what precedes the turn. It ends with the token that ends it.
        """
        other = _absent_from(text)
        changed, _ = self._render([*turns[:i], {**turns[i], "content": other}, *turns[i + 1 :]])
        before, _, after = changed.partition(other)
        start, end = len(before), len(text) - len(after)
        located = changed.count(other) == 1 and text.endswith(after)
        prompt = self._prompt_before(turns, i)
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
        else:
            located = located and text.startswith(before)
        stop = end + len(self._tail[0]) * text.startswith(self._tail[0], end)
        if not located or start > end or start == stop:
            raise DataError(
                f"{self.name} does not show where turn {i + 1} begins and ends, because its text depends on the turn; "
                "mark the assistant's part of the template with {% generation %} and {% endgeneration %}"
            )
        return start, stop, end

    def _prompt_before(self, turns: Sequence[Turn], i: int) -> str | None:
        """Return the turns before turn i with the generation prompt."""
        if i == 0 or turns[i - 1]["role"] == "assistant" or not self._has_generation_prompt:
            return None
        return self._render(turns[:i], generation=True)[0]

    @cached_property
    def _has_generation_prompt(self) -> bool:
        turns = self._probe[:1]
        return self._render(turns, generation=True) != self._render(turns)

    @cached_property
    def _tail(self) -> tuple[str, str]:
        """What follows an answer up to the token that ends its turn, and that token; both empty if there is none."""
        text, _ = self._render(self._probe)
        after = text.rpartition(self._probe[1]["content"])[2]
        tokens = sorted((re.escape(token) for token in self.added if not token.isspace()), key=len, reverse=True)
        found = re.match(rf"\s*({'|'.join(tokens)})", after) if tokens else None
        return (found[0], found[1]) if found else ("", "")

    @property
    def _probe(self) -> tuple[Turn, Turn]:
        return {"role": "user", "content": "Qjx"}, {"role": "assistant", "content": "Ajx"}

    def _render(self, turns: Sequence[Turn], generation: bool = False) -> tuple[str, list[Span]]:
        """Return the text and what the template marks in it."""
        try:
            texts, marks = render_jinja_template(
                conversations=[list(turns)],
                chat_template=self.text,
                return_assistant_tokens_mask=self._has_marks,
                add_generation_prompt=generation,
                **self.tokens,
            )
        except Exception as error:  # whatever the template raises, and jinja2's own kinds
            raise DataError(
                f"{self.name} cannot render the conversation: {error}; leave such rows out, or set data.chat_template"
            ) from error
        return texts[0], [(start, end) for start, end in marks[0] if start < end] if self._has_marks else []


def find_chat_template(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the configured chat template, else the tokenizer's own, else None.

    Raises:
        ConfigError: there is no template of that name, or the tokenizer lacks its tokens.
    """
    given = data.chat_template
    if given is None and not getattr(tokenizer, "chat_template", None):
        return None
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    tokens.setdefault("eos_token", str(tokenizer.convert_ids_to_tokens(end_token_id(tokenizer))))
    added = tuple(sorted({token.content for token in tokenizer.added_tokens_decoder.values()} | {tokens["eos_token"]}))
    if given is None:
        try:
            text = _dated(tokenizer.get_chat_template())
        except ValueError as error:  # several templates, and none is the default
            raise ConfigError(f"the tokenizer's chat template: {error}; set data.chat_template") from error
        return ChatTemplate("the tokenizer's chat template", text, tokens, added, True)
    if "{" in given:
        return ChatTemplate("data.chat_template", _dated(given), tokens, added, False)
    if given not in CHAT_TEMPLATES:
        raise ConfigError(
            f"data.chat_template: {given!r} is neither a file nor a built-in template{nearest(given, CHAT_TEMPLATES)}; "
            f"built in: {choices(CHAT_TEMPLATES)}"
        )
    lacking = [token for token in re.findall(r"<\|\w+\|>", CHAT_TEMPLATES[given]) if token not in added]
    if lacking:
        raise ConfigError(
            f"data.chat_template: {given!r} writes {lacking[0]!r}, which is no token of this tokenizer; `plain` fits "
            "every tokenizer"
        )
    return ChatTemplate(f"data.chat_template {given!r}", CHAT_TEMPLATES[given], tokens, added, False)


def _dated(template: str) -> str:
    """Return a template that writes always the same date."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda found: repr(TODAY.strftime(found[2])), template)


def _absent_from(text: str) -> str:
    """Return a word that does not occur in a text."""
    word = "Qxjz"
    while word in text:
        word += "jz"
    return word
