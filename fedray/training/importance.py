"""Empirical Fisher information of the outputs of a LoRA's target layers (FedHFT's `importance: fisher`).

With L_e the loss of training example e and y_e[t, i] a target layer's output at token t and dimension i,

    F[i] = 1/n Σ_e ( Σ_t ∂L_e / ∂y_e[t, i] )²

that is the squared gradient of the example's loss with respect to a shift of output i at all its tokens, averaged over
the examples. L_e is the example's negative log-likelihood, so for causal_lm the sum over its answer tokens; for
regression its squared error. Examples do not interact in the model, so one backward pass of the summed loss gives every
example's own gradient. Padding adds nothing: attention masks it out exactly, so its outputs have zero gradient.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.data.batches import batches
from fedray.errors import TrainingError
from fedray.evaluation.evaluate import Device
from fedray.evaluation.losses import score
from fedray.types import Task


def fisher_importance(
    adapter: Adapter, table: pa.Table, task: Task, batch_size: int, pad_token_id: int, device: Device
) -> dict[str, npt.NDArray[np.float64]]:
    """Return F of each of the adapter's target layers by module path, float64 [d_out]. No parameter's gradient is
    touched; adapter dropout is off.

    Raises:
        TrainingError: the table is empty, or F is not finite.
    """
    check_examples([table])
    adapter.model.eval()
    totals: dict[str, torch.Tensor] = {}
    for batch in batches(table, batch_size, pad_token_id, None, device):
        for path, gradient in shift_gradients(adapter.model, adapter.targets, batch, task).items():
            squares = gradient.double().square().flatten(0, -2).sum(0)
            totals[path] = totals[path] + squares if path in totals else squares
    return mean_importance(totals, table.num_rows)


def check_examples(tables: Iterable[pa.Table]) -> None:
    """Check that every table has examples.

    Raises:
        TrainingError: a table is empty.
    """
    if any(table.num_rows == 0 for table in tables):
        raise TrainingError("importance: the Fisher information is a mean over training examples, and there are none")


def mean_importance(totals: Mapping[str, torch.Tensor], num_examples: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return F from the sums of the examples' squared gradients.

    Raises:
        TrainingError: F is not finite.
    """
    fisher = {path: total.cpu().numpy() / num_examples for path, total in totals.items()}
    for path, values in fisher.items():
        if not np.isfinite(values).all():
            raise TrainingError(f"importance: the gradient at the output of {path!r} is not finite")
    return fisher


def shift_gradients(
    model: nn.Module, targets: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor], task: Task
) -> dict[str, torch.Tensor]:
    """Return ∂L_e / ∂shift for a zero shift per example and output dimension, [examples, 1, d_out], by module path.

    The shift is added to the output at all tokens, so autograd itself sums over them. A layer that the model calls
    several times (ALBERT's) has one shift.

    Raises:
        TrainingError: a layer's output has not one row per example.
    """
    shifts: dict[str, torch.Tensor] = {}
    examples = len(batch["input_ids"])

    def shift(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            if output.ndim < 3 or output.shape[0] != examples:
                raise TrainingError(
                    f"importance: {path!r} has an output of shape {tuple(output.shape)}, which is not one row per "
                    f"example ({examples}); choose other lora.targets, or `importance: energy`"
                )
            if path not in shifts:
                one_token = (output.shape[0], *(1 for _ in output.shape[1:-1]), output.shape[-1])
                shifts[path] = output.new_zeros(one_token, requires_grad=True)
            return output + shifts[path]

        return hook

    handles = [module.register_forward_hook(shift(path)) for path, module in targets.items()]
    try:
        loss = score(model, batch, task).losses.sum()
        gradients = torch.autograd.grad(loss, list(shifts.values()))
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(shifts, gradients, strict=True))
