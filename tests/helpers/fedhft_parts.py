"""Servers and updates of FedHFT by hand, without a model: two targets of 4 x 3 with rank 2, and a head of 2 x 3."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedray.adapters.layout import Layout, Slot
from fedray.aggregation.low_rank import LowRank
from fedray.config import LoraSection
from fedray.methods.fedhft import FedHft, MaskedUpdate, Server
from fedray.methods.parts.factors import join, keep_rows, pack_masks
from fedray.methods.protocol import Initial, Update
from fedray.types import Client

TWO = Layout(
    (Slot("q", "A", (2, 3)), Slot("q", "B", (4, 2)), Slot("v", "A", (2, 3)), Slot("v", "B", (4, 2))),
)
HEAD = Layout((Slot("classifier.weight", "tensor", (2, 3)),))
WIDTH, RANK = 16, 2
"""Of the tiny BERT that the fixture `fedhft` trains, and of its LoRA."""
TARGETS = [f"bert.encoder.layer.{block}.attention.self.{name}" for block in (0, 1) for name in ("query", "value")]
"""That LoRA's targets."""
IDS = "abcdefghijkl"


def method(**fields: Any) -> FedHft:
    return FedHft(lora=LoraSection(rank=2), **fields)


def initial_server(method: FedHft, number: int) -> Server:
    """The server of `number` clients a, b, ... with a head of ones."""
    layouts = {"lora": TWO, "head": HEAD}
    vectors = {"lora": np.zeros(TWO.size, np.float32), "head": np.ones(HEAD.size, np.float32)}
    return method.init_server(Initial(7, layouts, vectors), [Client(id, i, 5) for i, id in enumerate(IDS[:number])])


def delta(rows: Sequence[float]) -> LowRank:
    """The matrix whose row i is rows[i] · (1, 0, 0), as factors of rank 2."""
    A = np.array([[1, 0, 0], [0, 0, 0]], np.float32)
    return LowRank(np.stack([rows, np.zeros(4)], axis=1).astype(np.float32), A)


def update(
    id: str, deltas: Sequence[LowRank], masks: Sequence[Sequence[int]] | None = None, head: Any = None
) -> Update[MaskedUpdate]:
    kept = [np.array(mask, bool) for mask in masks or [[1] * 4] * len(deltas)]
    vector = np.ones(HEAD.size, np.float32) if head is None else np.array(head, np.float32)
    payload = MaskedUpdate(join(keep_rows(tuple(deltas), kept)), pack_masks(kept), vector)
    return Update(Client(id, IDS.index(id), 5), 5, payload)


def with_memberships(server: Server, *rows: Sequence[float]) -> Server:
    return replace(server, memberships={id: np.array(row, np.float32) for id, row in zip(IDS, rows, strict=False)})


def largest_rows(importance: Any, ratio: float) -> list[int]:
    """The ⌈ρ d_out⌉ most important rows, by sorting pairs."""
    ranked = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    return sorted(ranked[: math.ceil(ratio * len(importance))])
