"""The optimizers of several clients' rounds as one: each member has its own learning rate, step count and gradient
norm.

The formulas are `RoundOptimizer`'s, that is torch's, on rows of one matrix [members, trained values]. Where a member's
parameters have taken equally many steps, one factor per member is enough; otherwise every value has its own.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedray.adapters.adapter import TrainableGroup
from fedray.config import TrainConfig
from fedray.training.optimizer import weight_decays
from fedray.training.schedule import Schedule

Numbers = npt.NDArray[np.float64]


class BatchedOptimizer:
    """AdamW or SGD with decoupled weight decay.

    Args:
        groups: of one adapter.
        values: [members, size], whose first columns hold the groups' parameters one after another; they are changed in
            place.
        schedules: of each member, of one TrainConfig.
    """

    def __init__(self, groups: Sequence[TrainableGroup], values: Tensor, schedules: Sequence[Schedule]) -> None:
        self._groups, self._schedules = groups, schedules
        self._train: TrainConfig = schedules[0].train
        self._decays = weight_decays(groups, self._train)
        self._sizes = [[parameter.numel() for parameter in group.parameters] for group in groups]
        self._values = values[:, : sum(map(sum, self._sizes))]
        self._first = torch.zeros_like(self._values)
        self._second = torch.zeros_like(self._values) if self._train.optimizer == "adamw" else None
        self._steps = np.zeros((len(values), sum(map(len, self._sizes))), np.int64)

    def step(self, gradients: Tensor, index: int, present: npt.NDArray[np.bool_] | None) -> None:
        """Move the first members.

        Args:
            gradients: [members that go on, trained size]; overwritten.
            index: number of steps before this one.
            present: which parameters have a gradient, [members, parameters]; None: all. Others do not move.
        """
        members = len(gradients)
        if self._train.clip is not None:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients.mul_((self._train.clip / (norms + 1e-6)).clamp(max=1.0))
        self._steps[:members] += 1 if present is None else present
        rates = np.array([schedule.rates(self._groups, index) for schedule in self._schedules[:members]])
        start = place = 0
        for group, (sizes, decay) in enumerate(zip(self._sizes, self._decays, strict=True)):
            columns, own = slice(start, start + sum(sizes)), slice(place, place + len(sizes))
            if decay and self._second is None:  # as `decay_for_sgd`, which spares no parameter
                self._decay(members, columns, rates[:, group : group + 1] * decay)
            moving = None if present is None or present[:, own].all() else present[:, own]
            kept = [part.clone() for part in self._parts(members, columns)] if moving is not None else []
            steps = self._steps[:members, own]
            if (steps == steps[:, :1]).all():
                steps = steps[:, :1]
            self._move(members, columns, gradients[:, columns], rates[:, group : group + 1], steps, decay, sizes)
            if moving is not None:
                moves = _spread(moving, sizes, gradients.device)
                for part, old in zip(self._parts(members, columns), kept, strict=True):
                    part.copy_(torch.where(moves, part, old))
            start, place = columns.stop, own.stop

    def finite(self) -> list[bool]:
        """Return whether every value of each member is finite."""
        return [bool(finite) for finite in self._values.isfinite().all(dim=1).tolist()]

    def _parts(self, members: int, columns: slice) -> list[Tensor]:
        moments = [self._first] if self._second is None else [self._first, self._second]
        return [part[:members, columns] for part in (self._values, *moments)]

    def _decay(self, members: int, columns: slice, shares: Numbers) -> None:
        """shares: [members, 1]."""
        values = self._values[:members, columns]
        values.addcmul_(values, _spread(shares, None, values.device, values.dtype), value=-1)

    def _move(
        self,
        members: int,
        columns: slice,
        gradients: Tensor,
        rates: Numbers,
        steps: npt.NDArray[np.int64],
        decay: float,
        sizes: Sequence[int],
    ) -> None:
        """rates: [members, 1]. steps: [members, 1], or [members, parameters] where these differ. sizes: of the
        parameters."""
        train = self._train

        def factor(numbers: Numbers) -> Tensor:
            return _spread(numbers, sizes if numbers.shape[1] > 1 else None, gradients.device, gradients.dtype)

        values, first, *rest = self._parts(members, columns)
        if not rest:
            first.mul_(train.momentum).add_(gradients)
            values.sub_(first * factor(rates))
            return
        if decay:
            self._decay(members, columns, rates * decay)
        (second,) = rest
        beta1, beta2 = train.betas
        first.lerp_(gradients, 1 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        counted = np.maximum(steps, 1)  # a parameter that never moved is put back anyway
        denominator = second.sqrt().div_(factor(np.sqrt(1 - beta2**counted))).add_(train.eps)
        values.sub_(torch.div(first, denominator, out=denominator).mul_(factor(rates / (1 - beta1**counted))))


def _spread(
    numbers: npt.NDArray[np.generic],
    sizes: Sequence[int] | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return [members, 1], or with sizes every column as often as its parameter has values."""
    tensor = torch.as_tensor(numbers, dtype=dtype).to(device)
    if sizes is None:
        return tensor
    return tensor.repeat_interleave(torch.tensor(sizes, device=device), dim=1)
