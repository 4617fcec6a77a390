"""The learning rates of one client's training.

In step s of S and round t of T, with the configured peak (`lr`, or `head_lr` for the head) and m = min_lr / lr:

    rate = peak · up_s · up_t · (m + (1 − m) · round_decay^t · down_s · down_t)

up is the warm-up, from 0 to 1, and down the fall after it, from 1 to 0. Of the steps they are those of transformers'
`get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup` and `get_cosine_with_min_lr_schedule_with_warmup`:
the first step of a warm-up has rate 0, and the last of all is one step above the end of the fall. With
`schedule_over: run` the S steps of this round are the steps t · S to (t + 1) · S − 1 of T · S: for a client that takes
part in every round one schedule through its whole training. Of the rounds, a whole round at rate 0 would be lost: the W
rounds of a warm-up have the shares 1/(W+1) to W/(W+1).

The final pass is after round T − 1 and has its rates, except that round_decay goes on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedray.adapters.adapter import TrainableGroup
from fedray.config import TrainConfig, warmup_length


@dataclass(frozen=True)
class Schedule:
    """The learning rates of a training of `num_steps` steps. The group named `head` has `head_lr`.

    Attributes:
        server_round: counts from 0; the final pass has the number of rounds.
        num_steps: S.
        rounds: T.
    """

    train: TrainConfig
    server_round: int
    num_steps: int
    rounds: int = 1

    def rates(self, groups: Sequence[TrainableGroup], step: int) -> list[float]:
        """Return the rates of step 0 to `num_steps` - 1, one per group."""
        train, server_round = self.train, min(self.server_round, self.rounds - 1)
        total = self.num_steps
        if train.schedule_over == "run":
            step, total = server_round * total + step, self.rounds * total
        warmup = warmup_length(train.warmup_steps, total)
        warmup_rounds = warmup_length(train.warmup_rounds, self.rounds)
        up = min(1.0, step / warmup) if warmup else 1.0
        up *= min(1.0, (server_round + 1) / (warmup_rounds + 1))
        down = _fall(train.schedule, step, total, warmup)
        down *= _fall(train.round_schedule, server_round, self.rounds, warmup_rounds)
        decay, least = train.round_decay**self.server_round, train.min_lr / train.lr
        peaks = [_peak(group, train) for group in groups]
        return [up * (least * peak + (1 - least) * (decay * peak * down)) for peak in peaks]


def _fall(shape: str, place: int, total: int, warmup: int) -> float:
    """Return the share of the peak at a place of `total` ones, of which the first `warmup` do not fall yet."""
    if shape == "constant" or place < warmup:
        return 1.0
    length = max(1, total - warmup)
    if shape == "linear":
        return (total - place) / length
    return 0.5 * (1 + math.cos(math.pi * (place - warmup) / length))


def _peak(group: TrainableGroup, train: TrainConfig) -> float:
    return train.head_lr if group.name == "head" and train.head_lr is not None else train.lr
