"""How many actors of each tier fit on a cluster."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.config import ClientsConfig
from fedray.planning.placement import allot, allot_shared, allot_with_gpus, fit_times, fit_together, fits, requests


def asked(**tiers: dict[str, float]) -> dict[str, dict[str, float]]:
    return tiers


def test_eight_quarters_fill_two_gpus() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    quarter = asked(a={"CPU": 0.5, "GPU": 0.25})
    assert allot(quarter, {"a": 100}, {"a": None}, nodes) == {"a": 8}
    assert allot(quarter, {"a": 3}, {"a": None}, nodes) == {"a": 3}, "no more than there are clients for"
    for part, per_gpu in ((0.3, 3), (0.4, 2), (0.5, 2), (0.6, 1), (1, 1)):
        found = allot(asked(a={"CPU": 0.5, "GPU": part}), {"a": 100}, {"a": None}, nodes)
        assert found == {"a": 2 * per_gpu}, f"a fraction of {part} lies on one GPU"
    assert allot(asked(a={"GPU": 2.0}), {"a": 100}, {"a": None}, nodes) == {"a": 1}


def test_ten_tenths_are_one() -> None:
    """In floats ten times 0.1 is less than 1, and three times more than 0.3."""
    for part, whole in ((0.1, 1.0), (0.1, 0.3)):
        found = allot(asked(a={"CPU": part}), {"a": 100}, {"a": None}, [{"CPU": whole}])
        assert found == {"a": round(whole / part)}


def test_an_actor_lies_on_one_node() -> None:
    """Two nodes of half a GPU hold no actor of 0.75."""
    nodes = [{"CPU": 4.0, "GPU": 0.5}, {"CPU": 4.0, "GPU": 0.5}]
    assert not any(fits({"CPU": 1.0, "GPU": 0.75}, node) for node in nodes)
    assert fits({"CPU": 1.0, "GPU": 0.5}, nodes[0])
    assert not fits({"CPU": 1.0, "tpu": 1.0}, nodes[0])
    assert allot(asked(a={"CPU": 1.0, "GPU": 0.3}), {"a": 9}, {"a": None}, nodes) == {"a": 2}


def test_actors_go_where_most_clients_wait() -> None:
    """Six CPUs, 30 and 10 clients: after one each, the others go to a until 30/4 < 10/1, then to b, then to a: 4 and 2.
    A tier with a number of its own keeps it."""
    one = asked(a={"CPU": 1.0}, b={"CPU": 1.0})
    assert allot(one, {"a": 30, "b": 10}, {"a": None, "b": None}, [{"CPU": 6.0}]) == {"a": 4, "b": 2}
    assert allot(one, {"a": 30, "b": 10}, {"a": 1, "b": None}, [{"CPU": 6.0}]) == {"a": 1, "b": 5}


def test_tiers_must_fit_together() -> None:
    three = asked(a={"CPU": 1.0}, b={"CPU": 1.0}, c={"CPU": 1.0})
    assert not fit_together(three, [{"CPU": 2.0}])
    assert fit_together(three, [{"CPU": 2.0}, {"CPU": 1.0}])


def test_what_an_actor_asks_for() -> None:
    """Three tiers on two CPUs share them: 2/3 each, rounded down to ten-thousandths."""
    tiers: dict[str, Any] = {
        "a": {"share": 0.5},
        "b": {"share": 0.25, "num_cpus": 0.5, "num_gpus": 0.25, "memory": "2GB", "resources": {"fast": 1}},
        "c": {"share": 0.25},
    }
    clients = ClientsConfig.model_validate({"tiers": tiers})
    found = requests(clients, ["a", "b", "c"], [{"CPU": 2.0}])
    assert found["a"] == found["c"] == {"CPU": 0.6666, "GPU": 0.0, "memory": 0.0}
    assert found["b"] == {"CPU": 0.5, "GPU": 0.25, "memory": 2e9, "fast": 1.0}
    assert fit_together(found, [{"CPU": 2.0, "GPU": 1.0, "memory": 1e10, "fast": 1.0}])
    assert requests(clients, ["a"], [{"CPU": 64.0}])["a"]["CPU"] == 1.0
    assert requests(ClientsConfig(num_cpus=2.0), ["default"], [{"CPU": 64.0}])["default"]["CPU"] == 2.0


def shares(asked: dict[str, dict[str, float]], nodes: list[dict[str, float]], **most: int) -> dict[str, Any]:
    """(number, GPU) by tier; those that ask for no GPU share what is left."""
    sharing = [name for name in asked if "GPU" not in asked[name]]
    sizes, final = allot_with_gpus(asked, most, dict.fromkeys(asked), nodes, sharing)
    return {name: (sizes[name], final[name].get("GPU", 0.0)) for name in asked}


def test_gpus_that_nobody_asked_for_are_shared() -> None:
    """Five actors on two GPUs are three on one of them: 1/3 each. Beside an actor of 0.6 on each GPU, 0.4 is free, so
    two others get 1/3; where nothing is left they go without. No actor gets more than one."""
    one, strong = {"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.6}
    assert shares(asked(b=one), [{"CPU": 5.0, "GPU": 2.0}], b=9) == {"b": (5, 0.3333)}
    assert shares(asked(b=one), [{"CPU": 5.0, "GPU": 8.0}], b=3) == {"b": (3, 1.0)}
    assert shares(asked(b=one), [{"CPU": 5.0}], b=9) == {"b": (5, 0.0)}
    assert shares(asked(a=strong, b=one), [{"CPU": 4.0, "GPU": 2.0}], a=2, b=2) == {"a": (2, 0.6), "b": (2, 0.3333)}
    whole = {"CPU": 1.0, "GPU": 1.0}
    assert shares(asked(a=whole, b=one), [{"CPU": 4.0, "GPU": 1.0}], a=1, b=9) == {"a": (1, 1.0), "b": (3, 0.0)}


def test_one_actor_of_each_tier_shares_gpus_too() -> None:
    """Three tiers on two GPUs and two CPUs: two of them on one GPU."""
    third = {"CPU": 0.6666}
    assert shares(asked(a=third, b=third, c=third), [{"CPU": 2.0, "GPU": 2.0}], a=2, b=2, c=2) == dict.fromkeys(
        "abc", (1, 0.5)
    )


def test_who_shares_gpus_stays_on_nodes_that_have_them() -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert shares(asked(b={"CPU": 1.0}), nodes, b=99) == {"b": (8, 0.125)}


def test_a_large_actor_finds_the_large_node_whatever_the_order() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0}]
    for tiers in (asked(small={"CPU": 2.0}, big={"CPU": 4.0}), asked(big={"CPU": 4.0}, small={"CPU": 2.0})):
        assert fit_together(tiers, nodes)
        assert allot(tiers, {"small": 9, "big": 9}, dict.fromkeys(tiers), nodes) == {"small": 1, "big": 1}


def test_fixed_numbers_need_room() -> None:
    one, most, fixed = asked(a={"CPU": 1.0}, b={"CPU": 1.0}), {"a": 9, "b": 9}, {"a": 4, "b": None}
    assert allot(one, most, fixed, [{"CPU": 4.0}]) == {"a": 3, "b": 1}
    assert allot(one, most, fixed, [{"CPU": 4.0}] * 2) == {"a": 4, "b": 4}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 3, 4, 5, 7, 10, 20])), min_size=1, max_size=4),
    st.lists(st.integers(1, 80), min_size=1, max_size=3),
)
@pytest.mark.filterwarnings("error")
def test_what_is_allotted_has_room_and_nothing_more_would(parts: list[tuple[int, int]], sizes: list[int]) -> None:
    """Tenths of CPUs and GPUs. Beyond the one actor that every tier needs, no node is overfull in total, and every tier
    either has an actor per client or no node has room for one more by itself alone."""
    tiers = {f"t{i}": {"CPU": cpu / 10, "GPU": gpu / 10} for i, (cpu, gpu) in enumerate(parts)}
    nodes = [{"CPU": size / 10, "GPU": 4.0} for size in sizes]
    most = dict.fromkeys(tiers, 7)
    found = allot(tiers, most, dict.fromkeys(tiers), nodes)
    assert all(1 <= found[name] <= 7 for name in tiers)
    if fit_together(tiers, nodes):
        parts_of_gpus = [n for n, amounts in tiers.items() if 0.5 < amounts["GPU"] <= 1 for _ in range(found[n])]
        assert len(parts_of_gpus) <= 4 * len(nodes)
        for resource in ("CPU", "GPU"):
            used = sum(found[name] * tiers[name][resource] for name in tiers)
            assert used <= sum(node[resource] for node in nodes) + 1e-9


def test_the_workers_of_a_silo_need_room_at_the_same_time() -> None:
    """Three workers of a CPU lie on two nodes of two, four and another actor do not; without room nothing is taken."""
    one, two, most = asked(silo={"CPU": 1.0}, small={"CPU": 1.0}), [{"CPU": 2.0}, {"CPU": 2.0}], {"silo": 9, "small": 2}
    assert fit_together(one, two, {"silo": 3})
    assert not fit_together(one, two, {"silo": 4})
    assert allot(one, most, dict.fromkeys(one), two, workers={"silo": 3}) == {
        "silo": 1,
        "small": 1,
    }
    more = [{"CPU": 4.0}, {"CPU": 4.0}]
    assert allot(one, most, dict.fromkeys(one), more, workers={"silo": 3}) == {"silo": 2, "small": 2}


def test_workers_of_a_silo_take_whole_gpus_where_there_are_enough() -> None:
    tiers: dict[str, Any] = {"silo": {"share": 0.5, "workers": 2}, "b": {"share": 0.5}}
    clients = ClientsConfig.model_validate({"tiers": tiers})
    for gpus, expected in ((2.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        found = requests(clients, ["silo", "b"], [{"CPU": 2.0, "GPU": gpus}])
        assert found["silo"]["GPU"] == expected
        assert found["b"] == {"CPU": 0.6666, "GPU": 0.0, "memory": 0.0}, "two CPUs for three processes"


def test_pools_that_share_a_cluster_find_room_together() -> None:
    """7 CPUs for two pools of three tiers: one each is 6, and the seventh does not go round."""
    one, most, free = (
        asked(a={"CPU": 1.0}, b={"CPU": 1.0}, c={"CPU": 1.0}),
        {"a": 20, "b": 2, "c": 2},
        dict.fromkeys("abc"),
    )
    assert allot_shared(one, most, free, [{"CPU": 7.0}], 2) == {"a": 1, "b": 1, "c": 1}
    assert allot_shared(one, most, free, [{"CPU": 8.0}], 2) == {"a": 2, "b": 1, "c": 1}
    assert allot_shared(one, most, {"a": 3, "b": None, "c": None}, [{"CPU": 12.0}], 2) == {"a": 3, "b": 1, "c": 2}


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
def test_alone_or_together_nothing_is_overbooked(cpus: int, sharers: int, a: int, b: int) -> None:
    one, most, free = asked(a={"CPU": 1.0}, b={"CPU": 0.5}), {"a": a, "b": b}, {"a": None, "b": None}
    sizes = allot_shared(one, most, free, [{"CPU": float(cpus)}], sharers)
    assert all(1 <= sizes[name] <= most[name] for name in one)
    assert max(sizes.values()) == 1 or fit_times(one, sizes, sharers, [{"CPU": float(cpus)}])
    if sharers == 1 and fit_together(one, [{"CPU": float(cpus)}]):
        assert sizes == allot(one, most, free, [{"CPU": float(cpus)}])
