"""How much each branch of a LoRA layer counts: (w_R, w_L) in y = W0 x + s w_L B A x + s w_R B_R A_R x.

Every mixer is a module of the layer: it reads the layer's input x [..., d_in] and returns two weights, each a number or
a tensor that fits x [..., 1]. What it reads its weights from are linear layers without bias, so clients that are
computed in one step have their own (`fedray.adapters.stacked`); a weight that depends on nothing reads a constant 1.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from fedray.adapters.context import ForwardContext
from fedray.adapters.layout import Part

Mixer = Literal["adaptive", "scalars", "similarity", "experts", "none"] | float
"""`none`: both weights 1. A number α: w_L = α, w_R = 1 − α. `adaptive`: FedALT's softmax of G x. `scalars`: two numbers
per target that are loaded and may train. `similarity`: in training these numbers, in evaluation FedDPA's α(x) per
example (`fedray.adapters.similarity`). `experts`: FedLEASE's router; the second branch holds one expert after
another."""

Weight = Tensor | float


class Mixing(nn.Module):
    """Base class of the mixers, and the one whose weights are numbers that never change.

    Args:
        w_rest: w_R.
        w_own: w_L.
    """

    def __init__(self, w_rest: float = 1.0, w_own: float = 1.0):
        super().__init__()
        self._fixed = w_rest, w_own

    def forward(self, x: Tensor) -> tuple[Weight, Weight]:
        """Return (w_R, w_L)."""
        return self._fixed

    def linears(self) -> Iterator[tuple[Part, nn.Linear]]:
        """Yield the linear layers, by the part that their weights are in the group "mixer"."""
        yield from ()

    @property
    def constant(self) -> bool:
        """Whether the weights are the same for every input of an evaluation."""
        return True

    def weights(self) -> tuple[float, float]:
        """Return (w_R, w_L) of a mixer that is `constant`."""
        return self._fixed


class TokenMixer(Mixing):
    """(w_R, w_L) = softmax(G x) per token, G [2, d_in] (FedALT, arXiv 2503.11880).

    Args:
        context: where the mean of w_L is observed; None: nowhere.
    """

    def __init__(self, d_in: int, device: torch.device, context: ForwardContext | None):
        super().__init__()
        self.G, self._context = zero_linear(2, d_in, device), context

    def forward(self, x: Tensor) -> tuple[Weight, Weight]:
        weights = torch.softmax(self.G(x).float(), dim=-1)
        if self._context is not None and not self.training:
            self._context.observe("mixer_mean", weights[..., 1])
        return weights[..., :1], weights[..., 1:]

    @property
    def constant(self) -> bool:
        return False

    def linears(self) -> Iterator[tuple[Part, nn.Linear]]:
        yield "G", self.G


class Scalars(Mixing):
    """Two numbers, w_R [1, 1] and w_L [1, 1]; in a pass whose examples have an α of their own, α and 1 − α.

    Args:
        per_example: whether the examples of an evaluation have an α of their own.
    """

    def __init__(self, device: torch.device, context: ForwardContext | None, per_example: bool = False):
        super().__init__()
        self.w_R, self.w_L, self._context = zero_linear(1, 1, device), zero_linear(1, 1, device), context
        self._per_example = per_example

    def forward(self, x: Tensor) -> tuple[Weight, Weight]:
        alpha = None if self._context is None else self._context.alpha_for(x)
        if alpha is not None:
            return alpha, 1 - alpha
        one = x.new_ones(*x.shape[:-1], 1)
        return self.w_R(one), self.w_L(one)

    @property
    def constant(self) -> bool:
        return not self._per_example

    def weights(self) -> tuple[float, float]:
        return float(self.w_R.weight.detach()), float(self.w_L.weight.detach())

    def linears(self) -> Iterator[tuple[Part, nn.Linear]]:
        yield "w_R", self.w_R
        yield "w_L", self.w_L


class Router(Mixing):
    """FedLEASE's adaptive top-M routing per token (arXiv 2509.15087) over one's own expert and `others` more.

    The 2M − 1 logits G x are, in this order, one's own expert, the M − 1 others, and one's own M − 1 times more. The M
    largest of their softmax count, divided by their sum. So one's own expert always takes part, with between 1 and M of
    the choices. w_L [..., 1] is its sum, w_R [..., others] are the others'.

    M − 1 of the other experts exist: those whose number in `present` [others, 1] is not 0. The logits of the rest, and
    as many of one's own, do not count.
    """

    def __init__(self, others: int, d_in: int, device: torch.device):
        super().__init__()
        self.G, self.present = zero_linear(1 + 2 * others, d_in, device), zero_linear(others, 1, device)

    def forward(self, x: Tensor) -> tuple[Weight, Weight]:
        present = self.present(x.new_ones(*x.shape[:-1], 1)) != 0
        others = present.shape[-1]
        counted = torch.cat([torch.ones_like(present[..., :1]), present, present], -1)
        logits = self.G(x).float().masked_fill(~counted, float("-inf"))
        place = logits.detach().argsort(dim=-1, descending=True).argsort(dim=-1)
        # Masked before the softmax, and one's own weight as what is left of 1, so that gradients that are 0 have no
        # rounding, which AdamW would enlarge.
        shares = torch.softmax(logits.masked_fill(place > present.sum(-1, keepdim=True), float("-inf")), dim=-1)
        w_rest = shares[..., 1 : 1 + others]
        return w_rest, 1 - w_rest.sum(-1, keepdim=True)

    @property
    def constant(self) -> bool:
        return False

    def linears(self) -> Iterator[tuple[Part, nn.Linear]]:
        yield "G", self.G
        yield "present", self.present


def make_mixing(mixer: Mixer, d_in: int, others: int, device: torch.device, context: ForwardContext | None) -> Mixing:
    """Return a layer's mixer.

    Args:
        others: experts in the second branch, for `experts`.
        context: of the forward pass; None for a mixer of selected tokens, whose weights are not observed.
    """
    if isinstance(mixer, int | float):
        return Mixing(1 - float(mixer), float(mixer))
    if mixer == "none":
        return Mixing()
    if mixer == "adaptive":
        return TokenMixer(d_in, device, context)
    return Router(others, d_in, device) if mixer == "experts" else Scalars(device, context, mixer == "similarity")


def zero_linear(rows: int, columns: int, device: torch.device) -> nn.Linear:
    """Return a linear layer without bias, [rows, columns] zeros in float32."""
    layer: nn.Linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.float32).to_empty(device=device)
    if device.type != "meta":
        nn.init.zeros_(layer.weight)
    return layer
