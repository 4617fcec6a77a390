"""How many actors there should be, and when one that died is started again: decisions, without Ray."""

from typing import Any

import pytest

from fedray.config import load_config
from fedray.runtime.policies import DYING_S, IDLE_S, MAX_DEATHS, MAX_REQUESTED, Replacement, Scaling

NODE = {"CPU": 4.0, "memory": 1e12}


def scaling(nodes: int, cohort: int, elastic: bool = False, num_pools: int = 1, **clients: Any) -> Scaling:
    """Actors of one CPU each on nodes of four."""
    config = load_config(
        {
            "rounds": 1,
            "method": "fedavg",
            "model": {"path": "random", "tokenizer": "bytes", "config": {"model_type": "bert"}},
            "data": {"source": "synthetic"},
            "partition": {"kind": "by_file"},
            "clients": {"count": 500, "num_cpus": 1, **clients},
            "device": "cpu",
        }
    )
    return Scaling(config.clients, {"default": cohort}, [NODE] * nodes, elastic, num_pools)


@pytest.mark.parametrize(
    ("nodes", "cohort", "pools", "fixed", "expected"),
    [
        (2, 100, 1, None, 8),  # room for eight
        (2, 5, 1, None, 5),  # the cohort can use five
        (2, 100, 1, 3, 3),  # clients.actors
        (2, 100, 2, None, 4),  # half of the room
        (2, 100, 3, None, 2),
    ],
)
def test_as_many_as_the_cohort_can_use_and_the_nodes_have_room_for(
    nodes: int, cohort: int, pools: int, fixed: int | None, expected: int
) -> None:
    assert scaling(nodes, cohort, num_pools=pools, actors=fixed).sizes == {"default": expected}


@pytest.mark.parametrize(
    ("cohort", "pools", "fixed", "expected"),
    [(20, 1, None, 20), (1000, 1, None, MAX_REQUESTED), (20, 3, None, 7), (1000, 1, 300, 300)],
)
def test_with_an_autoscaler_the_nodes_that_there_are_do_not_matter(
    cohort: int, pools: int, fixed: int | None, expected: int
) -> None:
    assert scaling(1, cohort, elastic=True, num_pools=pools, actors=fixed).sizes == {"default": expected}


def test_it_grows_when_nodes_join_and_not_when_they_leave() -> None:
    found = scaling(1, 100)
    assert not found.nodes_changed([NODE])
    assert found.nodes_changed([NODE] * 3)
    assert found.sizes == {"default": 12}
    assert not found.nodes_changed([NODE])
    assert found.sizes == {"default": 12}
    assert not scaling(1, 100, elastic=True).nodes_changed([NODE] * 3)


def test_idle_actors_are_released_only_for_an_autoscaler() -> None:
    assert scaling(1, 100, elastic=True).releases(IDLE_S + 1)
    assert not scaling(1, 100, elastic=True).releases(IDLE_S - 1)
    assert not scaling(1, 100).releases(1e6)


def test_delays_double_up_to_a_quarter_of_the_time_to_give_up() -> None:
    policy = Replacement()
    assert [policy.died("weak", now=0.0) for _ in range(5)] == [2, 4, 8, DYING_S / 4, DYING_S / 4]
    assert (policy.deaths("weak"), policy.deaths("strong")) == (5, 0)


def test_it_gives_up_after_many_deaths_over_a_long_time_and_not_after_either() -> None:
    often, long = Replacement(), Replacement()
    assert all(often.died("weak", now=1.0) is not None for _ in range(10 * MAX_DEATHS))
    assert [long.died("weak", now=float(2 * DYING_S * k)) is None for k in range(MAX_DEATHS + 1)] == [
        *[False] * MAX_DEATHS,
        True,
    ]


def test_an_actor_that_starts_ends_the_series() -> None:
    policy = Replacement()
    for now in (0.0, 50.0, 100.0):
        policy.died("weak", now)
    policy.started("weak")
    assert policy.deaths("weak") == 0
    assert policy.died("weak", 150.0) == 2
