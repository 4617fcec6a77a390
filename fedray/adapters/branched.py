"""A linear layer with a LoRA branch and, optionally, a second branch and a mixer, or a core, on peft's layer.

The linear layer is torch's Linear, or transformers' Conv1D (GPT-2), which stores W0 transposed, as [d_in, d_out].

    y = W0 x + s · w_L B A drop(x) + s · w_R B_R A_R drop(x),      s = lora_alpha / r

FedALT (arXiv 2503.11880) mixes the branches per token, (w_R, w_L) = softmax(G x); FedHFT (arXiv 2510.14054) loads its
downlink into the second branch, with both weights 1 and without dropout. Both branches share s and one dropout draw.
`fedray.adapters.mixers` has all ways to weigh them. Where the second branch holds several experts, its components are
one expert's after another's, each weighted by its own w_R.

With a core (LoRA-XS and Fed-SB, arXiv 2502.15436) the first branch is s · B R A drop(x), R [r, r].

Only this file imports peft's layer at import time; `fedray.adapters.lora` imports it where a LoRA is attached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedray.adapters.context import ForwardContext
from fedray.adapters.dropout import KeyedDropout
from fedray.adapters.group import Entry
from fedray.adapters.layout import Part, Slot
from fedray.adapters.mixers import Mixer, Mixing, make_mixing, zero_linear
from fedray.adapters.rows import keep_rows

NAME = "default"
"""peft's name of the only adapter."""

LINEAR = (nn.Linear, Conv1D)
"""The kinds of layers that can have a branch."""


class BranchedLinear(lora.Linear):
    """peft's LoRA layer with a second branch and a mixer, or with a core. peft makes it; `complete` must follow.

    Shapes: x [batch, tokens, d_in]; A [r, d_in], B [d_out, r] or, with `set_rows`, [m, r]; A_R [r_R, d_in],
    B_R [d_out, r_R]; G [2, d_in] with row 0 for R and row 1 for L; the core's R [r, r].
    """

    adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_core", "lora_rest_A", "lora_rest_B", "lora_mixer")

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # peft walks over adapter_layer_names in here, so the dicts must exist before.
        self.lora_rest_A, self.lora_rest_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_core, self.lora_mixer = nn.ModuleDict(), nn.ModuleDict()
        self._rows: Tensor | None
        self.register_buffer("_rows", None, persistent=False)  # moves with the layer, and is in no checkpoint
        super().update_layer(adapter_name, *args, **kwargs)

    def complete(
        self,
        name: str,
        context: ForwardContext,
        dropout: float,
        rest_rank: int | None,
        rest_dropout: bool,
        mixer: Mixer,
        core: bool,
    ) -> None:
        """Add the second branch and the mixer, or the core; allocate everything with zeros, in float32, on the base
        weight's device.

        Args:
            name: the layer's path, which keys its dropout.
            rest_rank: rank of the second branch; None: no second branch, and no mixer.
            rest_dropout: whether the second branch sees the first one's dropped input.
            mixer: what weighs the branches.
            core: whether the first branch has an R.
        """
        device = self._base_weight().device
        rank, d_out, d_in = self.r[NAME], self.d_out, self.d_in
        shapes = {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}
        if core:
            shapes["lora_core"] = (rank, rank)
        if rest_rank is not None:
            shapes |= {"lora_rest_A": (rest_rank, d_in), "lora_rest_B": (d_out, rest_rank)}
            self.lora_mixer[NAME] = make_mixing(mixer, d_in, rest_rank // rank, device, context)
        for kind, (rows, columns) in shapes.items():
            getattr(self, kind)[NAME] = zero_linear(rows, columns, device)
        self.lora_dropout[NAME] = KeyedDropout(dropout, name, context)
        self._rest_dropout = rest_dropout
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)  # peft's name for a transposed weight
        self.set_adapter(NAME)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        for layer in (*self.lora_rest_A.values(), *self.lora_rest_B.values()):
            layer.requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            NotImplementedError: always; the base weight is shared between clients and never changes.
        """
        raise NotImplementedError("the base weight is shared between clients; nothing is merged into it")

    @property
    def d_out(self) -> int:
        """How many rows the whole B has. From peft's layer: the base weight itself may be partitioned, and so empty."""
        return cast(int, self.out_features)

    @property
    def d_in(self) -> int:
        """How many columns A has."""
        return cast(int, self.in_features)

    @property
    def rows(self) -> npt.NDArray[np.int64] | None:
        """Indices of the rows of B that exist; None: all."""
        return None if self._rows is None else self._rows.cpu().numpy()

    @property
    def num_rows(self) -> int:
        """How many rows of B exist."""
        return self.d_out if self._rows is None else len(self._rows)

    @property
    def own_b(self) -> nn.Parameter:
        """B of the individual branch."""
        return cast(nn.Parameter, self._linear("lora_B").weight)

    @property
    def alpha(self) -> float:
        """lora_alpha, of which the scale is s = lora_alpha / r."""
        return float(self.lora_alpha[NAME])

    @property
    def scale(self) -> float:
        """s."""
        return float(self.scaling[NAME])

    @property
    def mixing(self) -> Mixing | None:
        """What weighs the branches; None: there is no second one."""
        return cast(Mixing, self.lora_mixer[NAME]) if NAME in self.lora_mixer else None

    def set_rows(self, rows: npt.NDArray[np.int64] | None) -> bool:
        """Keep only these rows of B (None: all); see `Adapter.set_rows`.

        Returns:
            Whether B is a new parameter. With as many rows as before it is the same one, with other values.

        Raises:
            ValueError: not sorted distinct indices below d_out.
        """
        old = self.own_b
        kept, index = keep_rows(old.detach(), self._rows, rows, self.d_out)
        replaced = len(kept) != len(old)
        if replaced:
            self._linear("lora_B").weight = nn.Parameter(kept.clone(), requires_grad=old.requires_grad)
        else:
            old.data.copy_(kept)
        self._rows = index
        return replaced

    @contextmanager
    def unscattered(self) -> Iterator[None]:
        """Within, treat B as the whole one: a client batch scatters each member's rows itself."""
        rows, self._rows = self._rows, None
        try:
            yield
        finally:
            self._rows = rows

    def own_entries(self, path: str) -> Iterator[Entry]:
        """Yield A and B of the individual branch; `path` is the layer's path in the model."""
        yield _entry(path, "A", self._linear("lora_A"))
        yield _entry(path, "B", self._linear("lora_B"))

    def rest_entries(self, path: str) -> Iterator[Entry]:
        """Yield A and B of the second branch."""
        yield _entry(path, "A", self._linear("lora_rest_A"))
        yield _entry(path, "B", self._linear("lora_rest_B"))

    def mixer_entries(self, path: str) -> Iterator[Entry]:
        """Yield what the mixer computes with."""
        for part, layer in cast(Mixing, self.lora_mixer[NAME]).linears():
            yield _entry(path, part, layer)

    def core_entries(self, path: str) -> Iterator[Entry]:
        """Yield R."""
        yield _entry(path, "core", self._linear("lora_core"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        x = x.float()  # the adapter's own type
        dropped = self.lora_dropout[NAME](x)
        inner = self._components("lora_A", dropped)
        if NAME in self.lora_core:
            inner = self._linear("lora_core")(inner)
        own = self._scatter(self._linear("lora_B")(inner))
        if NAME not in self.lora_rest_A:
            return (y + own).to(y.dtype)
        w_rest, w_own = self.lora_mixer[NAME](x)
        inner = self._components("lora_rest_A", dropped if self._rest_dropout else x)
        if isinstance(w_rest, Tensor) and w_rest.shape[-1] > 1:  # one weight per expert of the second branch
            inner, w_rest = inner * w_rest.repeat_interleave(self.r[NAME], -1), 1.0
        rest = self._linear("lora_rest_B")(inner)
        mixed: Tensor = y + w_own * own + w_rest * rest
        return mixed.to(y.dtype)

    def _components(self, a: str, x: Tensor) -> Tensor:
        """s · A x; s is applied to these r values, and not to d_out."""
        scaled: Tensor = self._linear(a)(x) * self.scaling[NAME]
        return scaled

    def _scatter(self, y: Tensor) -> Tensor:
        """[..., m] to [..., d_out], zero outside the rows that exist."""
        if self._rows is None:
            return y
        return y.new_zeros(*y.shape[:-1], self.d_out).index_copy(-1, self._rows, y)

    def _linear(self, kind: str) -> nn.Linear:
        return cast(nn.Linear, getattr(self, kind)[NAME])

    def _base_weight(self) -> Tensor:
        return cast(Tensor, self.get_base_layer().weight)


def _entry(path: str, part: Part, layer: nn.Linear) -> Entry:
    return Entry(Slot(path, part, tuple(layer.weight.shape)), cast(nn.Parameter, layer.weight))
