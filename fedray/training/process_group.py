"""A process group: the processes that train one client together, data-parallel.

Every process runs the same code on the same values, takes its share of each step's micro-batches, and updates its
parameters with the sum of all gradients. A single process is a group of one, in which nothing is exchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


class ProcessLost(RuntimeError):
    """An exchange within the process group failed: another process died, or left its round with an error of its
    own."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place in its group. With more than one process, torch's default process group is the same one.

    Methods that exchange something raise ProcessLost if they cannot.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def mine(self, index: int) -> bool:
        """Return whether a step's micro-batch of this index is this process's."""
        return index % self.size == self.rank

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of all processes' tensors, which have one shape; the argument may be changed."""
        if self.size > 1:
            with _exchanging():
                distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Replace every process's gradients by the sum of all processes' gradients.

        A parameter without a gradient in every process keeps none, as in a single process: the optimizer does not move
        it.
        """
        if self.size == 1:
            return
        first = parameters[0]
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=first.device, dtype=first.dtype)
        flat = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters]
        total = self.sum(torch.cat([*flat, present]))
        *summed, anywhere = torch.split(total, [*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, held in zip(parameters, summed, anywhere.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if held else None

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """Return what the first process computes. The others wait for it, so that all agree to the last bit."""
        if self.size == 1:
            return compute()
        box = [compute() if self.rank == 0 else None]
        with _exchanging():
            distributed.broadcast_object_list(box, src=0)  # pickled: between processes of one run only
        return box[0]  # type: ignore[return-value]


@contextmanager
def _exchanging() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's; torch's own DistError is one, too
        raise ProcessLost(f"training together: another process is gone: {error}") from error


SINGLE_PROCESS = ProcessGroup()
