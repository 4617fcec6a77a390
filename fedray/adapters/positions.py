"""Which tokens a representation intervention edits."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fedray.adapters.client_batch import ClientBatch, Spread, spread
from fedray.adapters.context import Batch
from fedray.config import ReftSection


@dataclass(frozen=True)
class Positions:
    """The first `prefix` and the last `suffix` tokens, or `everything`. Frozen, so that batches can cache by it.

    Attributes:
        prefix: number of tokens from the start.
        suffix: number of tokens from the end.
        everything: whether all tokens are edited.
        tied: whether prefix and suffix share one intervention.
        halves: whether neither end has more than half of an example's tokens, as with pyreft; otherwise the prefix
            has what it can, and the suffix the rest.
    """

    prefix: int
    suffix: int
    everything: bool
    tied: bool
    halves: bool

    @classmethod
    def of(cls, section: ReftSection) -> "Positions":
        """Return what a section names: `f<p>+l<s>`, `f<p>`, `l<s>` or `all` (checked by the configuration)."""
        text = section.positions
        found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", text)
        prefix, suffix = (int(number or 0) for number in found.groups()) if found else (0, 0)
        return cls(prefix, suffix, text == "all", section.tie_positions, section.short_prompts == "halves")

    @property
    def wheres(self) -> tuple[str, ...]:
        """The names of the interventions that a block needs."""
        if self.everything or self.tied:
            return ("tied",)
        return tuple(where for where, number in (("prefix", self.prefix), ("suffix", self.suffix)) if number)


def select(positions: Positions, batch: Batch) -> dict[str, Tensor]:
    """Return, per intervention, the indices into [examples · tokens] that it edits.

    Counted over non-padding tokens, and over the prompt's where labels are known. No token is edited twice: in examples
    too short for both ends, the prefix wins, or with `halves` each end has at most half. A decoding step edits nothing,
    except for `all`.
    """
    if positions not in batch.selections:
        batch.selections[positions] = {
            where: mask.reshape(-1).nonzero().squeeze(1) for where, mask in _masks(positions, batch).items()
        }
    return batch.selections[positions]


def select_spread(positions: Positions, batch: Batch, members: ClientBatch) -> dict[str, Spread]:
    """Return `select` laid out as a rectangle over the members of a client batch."""
    if positions not in batch.spreads:
        batch.spreads[positions] = {
            where: spread(index, members, batch.shape[1]) for where, index in select(positions, batch).items()
        }
    return batch.spreads[positions]


def _masks(positions: Positions, batch: Batch) -> dict[str, Tensor]:
    if positions.everything:
        return {"tied": batch.valid}
    if batch.decoding:
        return {where: torch.zeros_like(batch.valid) for where in positions.wheres}
    rank = batch.prompt.cumsum(1)
    length = rank[:, -1:]
    most = length // 2 if positions.halves else length
    prefix = batch.prompt & (rank <= most.clamp(max=positions.prefix))
    suffix = batch.prompt & (rank > length - most.clamp(max=positions.suffix)) & ~prefix
    return {"tied": prefix | suffix} if positions.tied else {"prefix": prefix, "suffix": suffix}
