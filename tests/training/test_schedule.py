"""Learning rates against transformers' schedulers, and by hand."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from fedray.adapters.adapter import TrainableGroup
from fedray.config import TrainConfig, parse_yaml
from fedray.training.schedule import Schedule

GROUPS = [TrainableGroup(name, (nn.Parameter(torch.zeros(2)),), True) for name in ("lora", "head")]
SHAPES = ["constant", "linear", "cosine"]


def rates(train: TrainConfig, server_round: int, num_steps: int, rounds: int) -> list[list[float]]:
    """Return the rates of one training by step: those of the adapter and of the head."""
    schedule = Schedule(train, server_round, num_steps, rounds)
    return [schedule.rates(GROUPS, step) for step in range(num_steps)]


def transformers_rates(train: TrainConfig, warmup: int, total: int) -> list[float]:
    """Return the rates of a whole training by transformers' scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.lr)
    if train.min_lr:
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr=train.min_lr)
    else:
        make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
        scheduler = make[train.schedule](optimizer, warmup, total)
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@given(
    shape=st.sampled_from(["linear", "cosine", "cosine to min_lr"]),
    over=st.sampled_from(["round", "run"]),
    warmup=st.integers(0, 8) | st.floats(0.01, 0.6),
    steps=st.integers(1, 9),
    rounds=st.integers(1, 5),
)
def test_rates_are_those_of_transformers(shape: str, over: Any, warmup: float, steps: int, rounds: int) -> None:
    """In every round by itself, and over the run as one schedule of rounds · steps, in which nothing starts afresh. The
    head has three times the rate all along. transformers rounds a share of the steps up."""
    total = steps * (rounds if over == "run" else 1)
    number = int(warmup) if warmup >= 1 else math.ceil(warmup * total)
    assume(number < total)
    name, _, least = shape.partition(" to ")
    train = TrainConfig(
        lr=0.1, head_lr=0.3, schedule=name, schedule_over=over, warmup_steps=warmup, min_lr=0.004 if least else 0
    )
    ours = [pair for server_round in range(rounds) for pair in rates(train, server_round, steps, rounds)]
    theirs = transformers_rates(train, number, total) * (1 if over == "run" else rounds)
    assert [lr for lr, _ in ours] == pytest.approx(theirs, rel=1e-12, abs=1e-16)
    assert [lr for _, lr in ours] == pytest.approx([3 * lr for lr in theirs], rel=1e-12, abs=1e-16)


def test_linear_by_hand() -> None:
    """Four steps: the full rate, then 3/4, 2/4, 1/4 of it; round 2 with round_decay 1/2 has a quarter of that. With one
    step of warm-up: 0, then the full rate, 2/3 and 1/3 of it."""
    train = TrainConfig(lr=0.1, head_lr=1.0, schedule="linear", round_decay=0.5)
    assert rates(train, 0, 4, 9) == [pytest.approx([0.1 * f, f]) for f in (1.0, 0.75, 0.5, 0.25)]
    assert rates(train, 2, 4, 9)[1] == pytest.approx([0.01875, 0.1875])
    warm = TrainConfig(lr=0.3, schedule="linear", warmup_steps=1)
    assert [lr for lr, _ in rates(warm, 5, 4, 9)] == pytest.approx([0, 0.3, 0.2, 0.1])
    assert [lr for lr, _ in rates(TrainConfig(lr=0.3, warmup_steps=0.5), 0, 4, 9)] == pytest.approx([0, 0.15, 0.3, 0.3])


def test_cosine_over_rounds_is_openfedllms() -> None:
    """min + (lr − min) (1 + cos(π t / T)) / 2 in round t of T = 200, from 5e-5 to 1e-6, in every step of the round;
    half way it is the middle, 2.55e-5."""
    train = TrainConfig(lr=5e-5, round_schedule="cosine", min_lr=1e-6)
    for server_round in (0, 1, 77, 100, 199):
        expected = 1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * server_round / 200))
        assert rates(train, server_round, 10, 200) == [pytest.approx([expected, expected])] * 10
    assert rates(train, 100, 1, 200)[0][0] == pytest.approx(2.55e-5)


def test_rounds_by_hand() -> None:
    """Five rounds, two of warm-up: 1/3 and 2/3 of the rate, then the full one, 2/3 and 1/3 of it. min_lr, a tenth of
    lr, is where the fall ends, not where the warm-up starts: 0.1 + 0.9 · 2/3 = 0.7. The final pass is as round 4."""
    plain = TrainConfig(lr=0.6, round_schedule="linear", warmup_rounds=2)
    assert [rates(plain, t, 1, 5)[0][0] for t in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.4, 0.2, 0.2])
    least = plain.model_copy(update={"min_lr": 0.06})
    assert [rates(least, t, 1, 5)[0][0] for t in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.42, 0.24, 0.24])
    share = plain.model_copy(update={"warmup_rounds": 0.3})  # of five rounds 1.5, that is 2
    assert [rates(share, t, 1, 5) for t in range(6)] == [rates(plain, t, 1, 5) for t in range(6)]


def test_both_at_once_by_hand() -> None:
    """Linear in the round (1, 1/2) times linear over two rounds (1, 1/2), between lr 0.8 and min_lr 0.4."""
    train = TrainConfig(lr=0.8, schedule="linear", round_schedule="linear", min_lr=0.4)
    found = [lr for t in range(2) for lr, _ in rates(train, t, 2, 2)]
    assert found == pytest.approx([0.8, 0.6, 0.6, 0.5])


def test_the_final_pass_by_hand() -> None:
    """Two rounds of two steps as one schedule: 1, 3/4, then 2/4, 1/4; the final pass is as the last round. round_decay
    has no end and goes on, here to min_lr."""
    run = TrainConfig(lr=0.4, schedule="linear", schedule_over="run")
    assert [lr for t in range(3) for lr, _ in rates(run, t, 2, 2)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.2, 0.1])
    decay = TrainConfig(lr=0.4, round_decay=0.5, min_lr=0.2)
    assert [rates(decay, t, 1, 2)[0][0] for t in range(3)] == pytest.approx([0.4, 0.3, 0.25])


@pytest.mark.parametrize("shape", ["constant", "linear"])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_former_configurations_have_equal_bits(shape: Any, decay: float) -> None:
    """The formula of fedray 0.1: round_decay^t · lr · (S − s) / S, in this order."""
    train = TrainConfig(lr=0.0123, head_lr=0.7, schedule=shape, round_decay=decay)
    for server_round in (0, 3, 7):
        for step, found in enumerate(rates(train, server_round, 7, 5)):
            factor = (7 - step) / 7 if shape == "linear" else 1.0
            assert found == [decay**server_round * lr * factor for lr in (0.0123, 0.7)]


@given(
    schedule=st.sampled_from(SHAPES),
    round_schedule=st.sampled_from(SHAPES),
    warmup=st.integers(0, 12) | st.floats(0, 0.99),
    rounds=st.integers(1, 6),
    steps=st.integers(1, 9),
)
def test_rates_stay_within_their_bounds(
    schedule: Any, round_schedule: Any, warmup: float, rounds: int, steps: int
) -> None:
    """At most lr, and after the warm-up at least min_lr; a warm-up that is longer than the training does not end."""
    least = 0.03 if {schedule, round_schedule} != {"constant"} else 0.0
    train = TrainConfig(lr=0.1, schedule=schedule, round_schedule=round_schedule, warmup_steps=warmup, min_lr=least)
    warm = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    for server_round in range(rounds + 1):
        found = [lr for lr, _ in rates(train, server_round, steps, rounds)]
        assert all(0 <= lr <= 0.1 * (1 + 1e-12) for lr in found)
        assert all(lr >= least * (1 - 1e-12) for lr in found[warm:])
        assert found[:1] == ([0] if warm else found[:1])


def test_the_examples_of_the_page_are_valid() -> None:
    """docs/training.md, and its rows on pyreft and OpenFedLLM in numbers: 10 % of 300 steps; the rate in round 100."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    examples = [parse_yaml(text, "page") for text in re.findall(r"`(\{lr.*?\})` \|", page)]
    *_, openfed, adapters, pyreft = [TrainConfig.model_validate(example) for example in examples]
    assert len(examples) == 6
    assert rates(openfed, 100, 1, 200)[0][0] == pytest.approx(2.55e-5)
    assert rates(adapters, 0, 300, 3)[99][0] == pytest.approx(3e-4 * 0.99)
    assert rates(pyreft, 0, 100, 3)[29:31] == [pytest.approx([9e-4 * f] * 2) for f in (29 / 30, 1)]


def test_the_head_has_the_common_rate_by_default() -> None:
    assert Schedule(TrainConfig(lr=0.3), 0, 5).rates(GROUPS, 4) == [0.3, 0.3]
