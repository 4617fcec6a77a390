"""A language model with its adapter, as a model of lm-evaluation-harness (the package lm_eval, extra `lm-eval`).

The harness sends texts; tokens, batches and passes are fedray's. An adapter that edits positions of the prompt is told
where each request's context ends, so that f7+l7 edits the context and never the option that follows it:

- A log-likelihood is that of the option's tokens; every token before them is prompt. Requests share a pass only if both
  their tokens and the ends of their contexts are equal.
- A text is generated after its whole prompt.
- A rolling log-likelihood (perplexity of a whole text) has no prompt but the token that each window continues.

This is the only file that imports lm_eval at its top; import it where the harness is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedray.config import GenerationSection, describe
from fedray.config.generation import SAMPLING, SEARCHING
from fedray.data.batches import batches_by_length
from fedray.errors import ConfigError
from fedray.evaluation.evaluate import evaluating
from fedray.evaluation.generation import Decoding, continue_prompts
from fedray.evaluation.losses import logits_at
from fedray.models.checks import check_beams
from fedray.models.observing import unobserved
from fedray.models.tokenizer import end_token_id
from fedray.types import IGNORED

MAX_NEW_TOKENS = 256
"""Longest generated text of a task that does not say; the harness's own default."""

Tokens = list[int]
Scored = tuple[float, bool]
"""An option's log-likelihood, and whether greedy decoding would give it."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """One model.

    Args:
        model: with its adapter, if it has one, and its values.
        tokenizer: the model's.
        batch_size: texts in a pass.
        end_token_ids: tokens that end a generated text, besides the tokenizer's.
        seed: keys the draws of tasks that sample.
        plain: whether this is the base model without an adapter, whose search with beams is checked. An adapter that
            edits positions of the prompt reads another prompt where there is no cache, to which the check compares.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        end_token_ids: Sequence[int] = (),
        seed: int = 0,
        plain: bool = False,
    ):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._ends = tuple(dict.fromkeys((end_token_id(tokenizer), *end_token_ids)))
        self._seed, self._device, self._plain = seed, model.device, plain

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return end_token_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token that is the context of a request without one."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads, as the harness finds it."""
        return int(resolve_max_length(self.model.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        """Part of the names of the harness's cached requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Return the tokens of a text that something follows: the token with which the tokenizer begins a text, unless
        the text spells it, and not the one that ends it.

        Args:
            add_special_tokens: False leaves out the first token, too.
        """
        begins = string.startswith(self.tokenizer.decode(self.prefix_token_id)) and add_special_tokens is None
        if begins or add_special_tokens is False:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        ids: Tokens = self.tokenizer.encode(string)
        return ids[: len(ids) - self._num_ending]

    @cached_property
    def _num_ending(self) -> int:
        """How many tokens the tokenizer adds after a text."""
        text = "a"
        plain, whole = (len(self.tokenizer.encode(text, add_special_tokens=special)) for special in (False, True))
        begin = self.tokenizer.encode(text)[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        return whole - plain - int(begin)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a text."""
        text: Any = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """Return each option's score.

        Args:
            requests: the texts, and the tokens of context and option. Too long ones lose the start of the context.

        Raises:
            ConfigError: an option has no tokens, or more than the model reads.
        """
        passes: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (texts, context, option) in enumerate(requests):
            if not 0 < len(option) <= self.max_length:
                raise ConfigError(
                    f"lm-eval: an option has {len(option)} tokens, expected 1 to {self.max_length}: {str(texts)[-200:]}"
                )
            read = tuple([*(context or [self.prefix_token_id]), *option][-(self.max_length + 1) : -1])
            passes.setdefault((read, len(option)), []).append(index)
        found: list[Scored] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="options") as progress:
            for key, log_probabilities in self._scored(list(passes)):
                greedy = log_probabilities.argmax(-1)
                for index in passes[key]:
                    right = torch.tensor(requests[index][2], device=greedy.device)
                    chosen = log_probabilities.gather(1, right[:, None])
                    found[index] = float(chosen.sum()), bool(torch.equal(greedy, right))
                progress.update(len(passes[key]))
        return found

    def _scored(
        self, passes: Sequence[tuple[tuple[int, ...], int]]
    ) -> Iterator[tuple[tuple[tuple[int, ...], int], Tensor]]:
        """Yield every pass with the log-probabilities of its option's tokens, float32 [tokens, vocabulary].

        Args:
            passes: the tokens that the model reads, which are all but the option's last one, and the number of the
                option's tokens.
        """
        labels = [
            [IGNORED] * (len(read) - number + 1) + list(read[len(read) - number + 1 :]) for read, number in passes
        ]
        columns = {"input_ids": [list(read) for read, _ in passes], "labels": labels}
        table = pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name, rows in columns.items()})
        with evaluating(self.model), unobserved():
            for rows, batch in batches_by_length(table, self.batch_size, self._pad, self._device):
                where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
                for row, index in enumerate(rows):
                    read, number = passes[index]
                    where[row, len(read) - number : len(read)] = True
                logits = logits_at(self.model, batch, where).float().log_softmax(-1)
                for index, part in zip(rows, torch.split(logits, [passes[index][1] for index in rows]), strict=True):
                    yield passes[index], part

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, read in windows as the harness cuts them."""
        windows: list[tuple[None, Tokens, Tokens]] = []
        owner = []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model generates after each request's context. What a task says decides, and nothing that the
        model itself prefers.

        Raises:
            ConfigError: a task asks for what fedray's decoding or the model does not have, or leaves no room for the
                context.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        for number, rows in enumerate(tqdm(groups.values(), disable=disable_tqdm, desc="generation")):
            decoding = self._decoding(requests[rows[0]].args[1])
            room = self.max_length - decoding.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"lm-eval: max_gen_toks: {decoding.max_new_tokens}, but the model reads at most {self.max_length} "
                    "tokens, the context included"
                )
            contexts = [self.tok_encode(requests[row].args[0])[-room:] or [self.prefix_token_id] for row in rows]
            table = pa.table({"input_ids": pa.array(contexts, pa.list_(pa.int32()))})
            about = decoding, self.batch_size, self._pad, self._device, ("lm_eval", number)
            with evaluating(self.model):
                for row, text in zip(rows, continue_prompts(self.model, table, *about), strict=True):
                    texts[row] = text
        return texts

    def _decoding(self, asked: Mapping[str, Any]) -> Decoding:
        """Return how texts are generated from a task's `generation_kwargs`."""
        options = dict(normalize_gen_kwargs(dict(asked), MAX_NEW_TOKENS))
        max_new_tokens, until = options.pop("max_gen_toks"), options.pop("until")
        idle = {} if options["do_sample"] else dict(SAMPLING)
        idle |= {} if options.get("num_beams", 1) > 1 else dict(SEARCHING)
        options = {name: value for name, value in options.items() if name not in idle}
        options["stop_strings"] = [text for text in until if text]
        try:
            section = GenerationSection.model_validate(options)
        except ValidationError as error:
            lines = "; ".join(describe(error, GenerationSection))
            raise ConfigError(f"lm-eval: generation_kwargs: {lines}") from None
        if self._plain and section.num_beams > 1:
            check_beams(self.model, section.num_beams)
        return Decoding(self.tokenizer, max_new_tokens, self._ends, section, self._seed)

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)
