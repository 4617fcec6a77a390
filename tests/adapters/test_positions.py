"""Which tokens are edited, against pyreft's own positions and by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedray.adapters.client_batch import ClientBatch
from fedray.adapters.context import Batch
from fedray.adapters.positions import Positions, select, select_spread
from fedray.config import ReftSection

Edited = dict[str, set[int]]


def pyreft_positions(section: ReftSection, length: int) -> Edited:
    """pyreft's positions in a prompt of `length` tokens by the intervention that edits them: two interventions unless
    the section has one end only, or shares its weights. -1 fills up."""
    from pyreft.dataset import get_intervention_locations

    wheres = Positions.of(section).wheres
    rows = get_intervention_locations(
        last_position=length,
        positions=section.positions,
        num_interventions=len(wheres),
        share_weights=section.tie_positions,
    )
    return {where: set(row) - {-1} for where, row in zip(wheres, rows, strict=True)}


def edited(section: ReftSection, batch: Batch) -> list[Edited]:
    """Return, per example, the columns that each intervention edits."""
    positions, width = Positions.of(section), batch.shape[1]
    indices = {where: index.tolist() for where, index in select(positions, batch).items() if where in positions.wheres}
    return [
        {where: {i % width for i in index if i // width == example} for where, index in indices.items()}
        for example in range(batch.shape[0])
    ]


def batch_of(lengths: list[int], left: bool, answers: int = 0, real: Tensor | None = None) -> tuple[Batch, list[int]]:
    """Return a batch of prompts with answers behind them, and in which column each prompt starts."""
    width = max(lengths) + answers + 2
    starts = [width - length - answers if left else 0 for length in lengths]
    columns = torch.arange(width)
    first, size = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    mask = (columns >= first) & (columns < first + size + answers)
    labels = torch.where(mask & (columns >= first + size), columns, -100) if answers else None
    return Batch((len(lengths), width), mask.long(), labels, False, "cpu", real), starts


NUMBER = st.integers(1, 9)


@given(
    positions=st.builds("f{}".format, NUMBER)
    | st.builds("l{}".format, NUMBER)
    | st.builds("f{}+l{}".format, NUMBER, NUMBER),
    tied=st.booleans(),
    left=st.booleans(),
    answers=st.sampled_from([0, 3]),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
)
def test_halves_are_pyrefts(positions: str, tied: bool, left: bool, answers: int, lengths: list[int]) -> None:
    """Prompts of every length, padded on either side, with and without an answer behind them."""
    section = ReftSection(positions=positions, tie_positions=tied, short_prompts="halves")
    batch, starts = batch_of(lengths, left, answers)
    for found, start, length in zip(edited(section, batch), starts, lengths, strict=True):
        expected = pyreft_positions(section, length)
        assert found == {where: {start + place for place in places} for where, places in expected.items()}


@pytest.mark.parametrize(
    ("short", "length", "prefix", "suffix"),
    [
        ("prefix", 10, 7, 3),
        ("halves", 10, 5, 5),
        ("prefix", 11, 7, 4),
        ("halves", 11, 5, 5),
        ("prefix", 13, 7, 6),
        ("halves", 13, 6, 6),
        ("prefix", 14, 7, 7),
        ("halves", 14, 7, 7),
        ("prefix", 3, 3, 0),
        ("halves", 3, 1, 1),
        ("prefix", 1, 1, 0),
        ("halves", 1, 0, 0),
        ("prefix", 0, 0, 0),
        ("halves", 0, 0, 0),
    ],
)
def test_short_prompts_by_hand(short: Any, length: int, prefix: int, suffix: int) -> None:
    """f7+l7, whose sides fit from 14 tokens on; one token of 11 and 13 is nobody's with halves."""
    section = ReftSection(positions="f7+l7", short_prompts=short)
    batch, _ = batch_of([length, 20], left=False)
    assert edited(section, batch)[0] == {"prefix": set(range(prefix)), "suffix": set(range(length - suffix, length))}
    assert edited(section, batch)[1] == {"prefix": set(range(7)), "suffix": set(range(13, 20))}


@pytest.mark.parametrize("positions", ["f3", "l3"])
def test_one_end_has_half_as_well(positions: str) -> None:
    """Four tokens: three of them by default, two with halves."""
    batch, _ = batch_of([4], left=False)
    counts = [
        [len(places) for places in edited(section, batch)[0].values()]
        for section in (ReftSection(positions=positions), ReftSection(positions=positions, short_prompts="halves"))
    ]
    assert counts == [[3], [2]]


@pytest.mark.parametrize("tied", [False, True])
def test_a_client_batch_counts_what_each_member_edits(tied: bool) -> None:
    """f3+l3 with halves. Member 0 has prompts of 4 and 1 tokens, member 1 one of 7 and a padding row: 2 + 0 and 3 + 0
    at either end."""
    section = ReftSection(positions="f3+l3", tie_positions=tied, short_prompts="halves")
    members = ClientBatch((0, 1), ((2, 8), (1, 9)), 2, "cpu")
    batch, _ = batch_of([4, 1, 7, 5], left=False, answers=2, real=members.real)
    spreads = select_spread(Positions.of(section), batch, members)
    counts = {where: laid.counts for where, laid in spreads.items()}
    assert counts == ({"tied": (4, 6)} if tied else {"prefix": (2, 3), "suffix": (2, 3)})
