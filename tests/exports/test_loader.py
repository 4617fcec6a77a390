"""The exported loader chooses the same tokens as fedray's own hooks."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedray.adapters.context import Batch
from fedray.adapters.positions import Positions, select
from fedray.exports.loader import selected


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    left=st.booleans(),
    ends=st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any),
    kind=st.sampled_from(["all", "tied", "apart"]),
    halves=st.booleans(),
    decoding=st.booleans(),
)
def test_the_loader_edits_the_tokens_that_fedray_edits(
    lengths: list[int], left: bool, ends: tuple[int, int], kind: str, halves: bool, decoding: bool
) -> None:
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length if left else 0 : longest if left else length] = 1
    positions = Positions(*ends, everything=kind == "all", tied=kind == "tied", halves=halves)
    ours = select(positions, Batch((len(lengths), longest), mask, None, decoding, "cpu"))
    current: Any = SimpleNamespace(valid=mask.bool(), decoding=decoding)
    theirs = selected(vars(positions), current)
    for where, index in ours.items():
        chosen = theirs.get(where, torch.zeros_like(mask))
        assert torch.equal(chosen.reshape(-1).nonzero().squeeze(1), index)
