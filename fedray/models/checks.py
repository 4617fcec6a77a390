"""What a model must not read, checked once per node where its weights are first loaded, on a few short rows.

- A language model must not read the tokens after the one that it predicts the next of: it would see the answers.
- A text's result must not depend on padding, or on the texts beside it: losses would change with the batch size.
- Training must not draw random numbers of the model's own, which no seed of an experiment keys.

Differences are compared with the change that another token causes, so that the checks also find what a model with
small weights reads. They are checks of these weights on a CPU, with whatever attention transformers chooses there.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedray.errors import ConfigError, one_line
from fedray.models.load_options import LoadOptions
from fedray.types import Task

SHORT, LONG = 6, 13
"""Tokens of the row that is looked at, and of the longer one beside it."""
SMALL = 100_000_000
"""Parameters up to which a model in a half type is checked as a float32 copy."""
TOLERANCE = {torch.float32: 1e-3}
"""Of the change that another token causes, by type; clean families stay below 1e-4 in float32."""
HALF_TOLERANCE = 0.1
BEAM_TOLERANCE = {torch.float32: 1e-3}
"""Of the log-likelihood that a search finds, by type."""
HALF_BEAM_TOLERANCE = 1e-2
PASSES = 4
"""Passes of training that must agree: a router that draws may choose the same experts twice."""
ROUNDING = 16
"""Units of rounding of the largest logit that no check looks below."""

READS_LEFT_PADDING = "fedray_reads_left_padding"
"""Attribute of a loaded model, read by `reads_left_padding`."""

log = logging.getLogger(__name__)


def reads_left_padding(model: Any) -> bool:
    """Return whether the model generates another text if its prompt is padded on the left (see `check_model`)."""
    return bool(getattr(model, READS_LEFT_PADDING, False))


def check_model(name: str, model: PreTrainedModel, task: Task, positions: int | None) -> bool:
    """Check what the model reads. It is in evaluation mode afterwards.

    A model that cannot run a few tokens on a CPU, such as one whose code needs a GPU, is not checked; a warning says
    so.

    Args:
        name: the model's, for messages.
        positions: the most tokens that it can read; None: any number.

    Returns:
        Whether a language model generates another text if its prompt is padded on the left. Training never pads there.

    Raises:
        ConfigError: the model reads later tokens, padding on the right, or the other texts of its batch, draws random
            numbers in training, or does not predict one token after each token.
    """
    model.eval()
    pad, tokens = getattr(model.config, "pad_token_id", None), _plain_tokens(model)
    longest = min(LONG, positions or LONG)
    if pad is None or len(tokens) < 2 or longest <= SHORT:
        log.warning("%s is too small to be checked for reading later tokens or padding", name)
        return False
    if model.dtype != torch.float32 and sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
        model = copy.deepcopy(model).float()
    rows = _Rows(model, task, tokens, longest, pad)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            read = rows.measure()
        except ConfigError:
            raise
        except Exception as error:  # models of the hub's own may need anything
            log.warning(
                "%s cannot be checked for reading later tokens or padding, since it does not run a few tokens on a "
                "CPU: %s",
                name,
                one_line(error),
            )
            return False
    _refuse(name, model, task, read)
    return read.left_padding


def check_beams(model: Any, num_beams: int) -> None:
    """Check that a language model's cache follows the beams of a search: that the text found with it is as likely as
    the one found without.

    Raises:
        ConfigError: transformers cannot search with this model, or the cache keeps a part of what other beams read.
    """
    tokens = _plain_tokens(model)
    row = torch.tensor([[tokens[place * 7 % len(tokens)] for place in range(SHORT)]], device=model.device)

    def likelihood(use_cache: bool) -> float:
        found = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=SHORT,
            min_new_tokens=SHORT,
            do_sample=False,
            num_beams=num_beams,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=use_cache,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return float(found.sequences_scores[0])

    refusal = f"evaluation.generation.num_beams: {num_beams}, but {type(model).__name__} cannot search with beams"
    try:
        with torch.no_grad():
            cached, whole = likelihood(True), likelihood(False)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"{refusal}: {one_line(error)}") from error
    if not abs(cached - whole) <= BEAM_TOLERANCE.get(model.dtype, HALF_BEAM_TOLERANCE) * abs(whole):
        raise ConfigError(f"{refusal}: its cache keeps what other beams have read")


@dataclass(frozen=True)
class _Read:
    """Whether a model reads what it must not, or draws random numbers in training."""

    later: bool
    others: bool
    padding: bool
    draws: bool
    left_padding: bool


@dataclass(frozen=True)
class _Rows:
    """Short rows of tokens through one model.

    Attributes:
        tokens: that the rows are made of.
        longest: tokens of the longer row.
        pad: the padding token.
    """

    model: PreTrainedModel
    task: Task
    tokens: Sequence[int]
    longest: int
    pad: int

    def measure(self) -> _Read:
        short, long = self._row(SHORT, 0), self._row(self.longest, 1)
        places = range(1, SHORT - (0 if self.task == "causal_lm" else 1))
        rows = torch.stack([*(self._changed(short, place) for place in places), short])
        alone, several = self._logits(short[None])[0], self._logits(rows)
        effect, largest = _distance(several[:-1], several[-1:]), float(several.abs().max())
        tolerance = max(TOLERANCE.get(self.model.dtype, HALF_TOLERANCE) * effect, _rounding(self.model.dtype) * largest)

        def differ(one: Tensor, two: Tensor) -> bool:
            return not _distance(one, two) <= tolerance  # also where a value is not finite

        ids, mask = self._padded([short, long], left=False)
        padded = [self._logits(ids, mask)[0]]
        if self.task == "causal_lm":
            padded = [logits[:SHORT] for logits in (*padded, self._logits(self._filled(ids, mask), mask)[0])]
        return _Read(
            later=self.task == "causal_lm"
            and any(differ(several[row, :place], several[-1, :place]) for row, place in enumerate(places)),
            others=differ(several[-1], alone) or self._normalises(),
            padding=any(differ(logits, alone) for logits in padded),
            draws=not self._normalises() and self._draws(rows),
            left_padding=self.task == "causal_lm" and self._reads_left_padding(short, long, differ),
        )

    def _logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits as training and evaluation compute them, in float32."""
        options = {"use_cache": False} if self.task == "causal_lm" else {}
        mask = torch.ones_like(ids) if mask is None else mask
        logits = cast(Tensor, self.model(input_ids=ids, attention_mask=mask, **options).logits).float()
        if self.task == "causal_lm" and logits.shape[:-1] != ids.shape:
            raise ConfigError(
                f"model.path: {type(self.model).__name__} gives an output of shape {tuple(logits.shape)} for "
                f"{tuple(ids.shape)} tokens; a language model gives one distribution per token; choose another model"
            )
        return logits

    def _normalises(self) -> bool:
        """Return whether a layer normalises over the batch in training; a pass would change what it holds."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())

    def _draws(self, rows: Tensor) -> bool:
        """Return whether passes of training differ: the dropout that a configuration names is already off."""
        self.model.train()
        try:
            first, *others = (self._logits(rows) for _ in range(PASSES))
        finally:
            self.model.eval()
        return not all(torch.equal(first, other) for other in others)

    def _reads_left_padding(self, short: Tensor, long: Tensor, differ: Any) -> bool:
        """Generate two tokens alone and padded, also by another token than the padding token: only the mask may decide.
        What cannot be generated in a batch counts as reading padding; what else a model does must be checked all the
        same."""
        if not self.model.can_generate():
            return False
        (ids, mask), several = self._padded([short], left=True), self._padded([short, long], left=True)
        try:
            alone = self._generated(ids, mask)
            padded = [self._generated(each, several[1]) for each in (several[0], self._filled(*several))]
        except Exception:  # Reformer, ProphetNet: positions that do not start at the first column are refused
            return True
        if any(differ(one.logits[0][0], alone.logits[0][0]) for one in padded):
            return True
        # After another first token the second logits are others'.
        same = [one for one in padded if alone.sequences[0, -2] == one.sequences[0, -2]]
        return any(bool(differ(one.logits[1][0], alone.logits[1][0])) for one in same)

    def _generated(self, ids: Tensor, mask: Tensor) -> Any:
        model: Any = self.model
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )

    def _row(self, length: int, seed: int) -> Tensor:
        """Return tokens between those with which the family's texts begin and end; a prompt has no end."""
        config: Any = self.model.config
        generator = torch.Generator().manual_seed(seed)
        row = torch.tensor(self.tokens)[torch.randint(len(self.tokens), (length,), generator=generator)]
        begin = _first(getattr(config, "bos_token_id", None), getattr(config, "cls_token_id", None))
        if begin is not None:
            row[0] = begin
        end = _first(getattr(config, "eos_token_id", None), getattr(config, "sep_token_id", None))
        if end is not None and self.task != "causal_lm":
            row[-1] = end
        return row

    def _changed(self, row: Tensor, place: int) -> Tensor:
        """Return the row with another token at one place."""
        changed = row.clone()
        changed[place] = next(token for token in self.tokens if token != row[place])
        return changed

    def _padded(self, rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            where = slice(width - len(row), None) if left else slice(len(row))
            ids[index, where], mask[index, where] = row, 1
        return ids, mask

    def _filled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the rows with another token where they are padded: only the mask may decide."""
        return torch.where(mask == 1, ids, self.tokens[0])


def _refuse(name: str, model: PreTrainedModel, task: Task, read: _Read) -> None:
    family = type(model).__name__
    if read.later:
        raise ConfigError(
            f"model.path: {name} ({family}) reads the tokens after the one that it predicts the next of. As a language "
            "model it would see the answers, and its losses would mean nothing. Choose a decoder (such as GPT-2, Llama "
            "or Qwen), or set the field of model.config that makes this family causal, if it has one"
        )
    if read.padding or read.others:
        what = "the other texts of a batch" if read.others else "padding"
        remedy = "choose another model"
        if task != "causal_lm" and LoadOptions.of(model.config).pooling == "head":
            remedy += ", or set model.pooling to last or mean, which helps if only the family's own head does so"
        raise ConfigError(
            f"model.path: {name} ({family}) reads {what}, so that a text's loss would depend on the batch size and on "
            f"the texts beside it; {remedy}"
        )
    if read.draws:
        raise ConfigError(
            f"model.path: {name} ({family}) draws random numbers of its own in training, such as noise in a router, so "
            "that no run could be repeated; set the field of model.config that turns it off, or choose another model"
        )


def _plain_tokens(model: PreTrainedModel) -> list[int]:
    """Return tokens of the vocabulary that no field of the configuration gives a meaning."""
    fields = model.config.to_dict()
    special = {
        token
        for field, value in fields.items()
        if field.endswith("token_id")
        for token in (value if isinstance(value, list) else [value])
    }
    return [token for token in range(min(getattr(model.config, "vocab_size", 1000), 1000)) if token not in special]


def _first(*values: Any) -> int | None:
    """Return the first token that is one; a field may hold None or a list."""
    found = [value[0] if isinstance(value, list) and value else value for value in values]
    return next((value for value in found if isinstance(value, int)), None)


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def _rounding(dtype: torch.dtype) -> float:
    return ROUNDING * torch.finfo(torch.float32).eps if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
