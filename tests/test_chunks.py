"""How clients are handed to actors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.chunks import Chunks, Group, groups
from fedray.errors import ClientFailure
from fedray.types import Client
from fedray.worker import Assignment


def assignments(*examples: int, tier: str = "default") -> list[Assignment]:
    """Clients a, b, c, ... with these numbers of examples."""
    return [Assignment(Client(chr(97 + i), i, n, tier), 5, measure=False) for i, n in enumerate(examples)]


def alone(*examples: int) -> list[Group]:
    return [(assignment,) for assignment in assignments(*examples)]


def names(chunk: list[Group]) -> str:
    return " ".join("".join(assignment.client.id for assignment in group) for group in chunk)


def test_groups_are_consecutive_clients_of_one_tier() -> None:
    both = [*assignments(5, 4, 3, tier="x"), *assignments(9, 8, tier="y")]
    found = groups(both, {"x": 2, "y": 1, "z": 4})
    assert {tier: names(entries) for tier, entries in found.items()} == {"x": "ab c", "y": "a b", "z": ""}


def test_chunks_shrink() -> None:
    """Eight clients of 9 examples, a work of 10 each, and two actors: a quarter of 80 is two clients, of 60 one (15),
    and so on; one client is the least."""
    chunks = Chunks(alone(*[9] * 8), 0)
    taken = []
    while chunks:
        taken.append(names(chunks.take(2)))
    assert taken == ["a b", "c", "d", "e", "f", "g", "h"]
    assert names(Chunks(alone(*[9] * 8), 0).take(1)) == "a b c d"


def test_chunks_are_worth_their_message_but_nobody_gets_more_than_an_equal_part() -> None:
    """Eight clients of a work of 10 and two actors: 35 is worth it, three clients; 100 would be, but half is 40."""
    chunks = Chunks(alone(*[9] * 8), 0)
    assert [names(chunks.take(2, 35)) for _ in range(3)] == ["a b c", "d e f", "g h"]
    chunks = Chunks(alone(*[9] * 8), 0)
    assert [names(chunks.take(2, 100)) for _ in range(2)] == ["a b c d", "e f g h"]


def test_a_large_client_is_a_chunk_of_its_own() -> None:
    """100 + 10 · 10: a quarter is 50; the rest, ten times 10, is shared by chunks of two and then one."""
    chunks = Chunks(alone(99, *[9] * 10), 0)
    assert [names(chunks.take(2)) for _ in range(4)] == ["a", "b c", "d e", "f"]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 8), st.integers(1, 5))
def test_everybody_is_handed_out_once_in_whole_groups(examples: list[int], actors: int, width: int) -> None:
    entries = groups(assignments(*examples), {"default": width})["default"]
    chunks = Chunks(entries, 0)
    taken: list[Group] = []
    while chunks:
        chunk = chunks.take(actors)
        assert chunk
        taken += chunk
    assert taken == entries
    assert [assignment for group in taken for assignment in group] == assignments(*examples)


def test_what_a_dead_actor_left_comes_back_group_by_group_and_nobody_is_blamed() -> None:
    chunks = Chunks(groups(assignments(*[9] * 8), {"default": 2})["default"], 0)
    chunk = chunks.take(1)
    assert names(chunk) == "ab cd"
    chunks.failed(chunk, 2, RuntimeError("killed"))
    assert [names(chunks.take(1)) for _ in range(2)] == ["cd", "ef"]
    assert names(chunks.take(1)) == "gh"
    assert not chunks


def test_who_was_alone_with_its_actor_is_blamed() -> None:
    chunks = Chunks(alone(9), 1)
    chunk = chunks.take(1)
    chunks.failed(chunk, 0, RuntimeError("killed"))
    chunk = chunks.take(1)
    with pytest.raises(ClientFailure, match=r"a: its actor died 2 times in round 5 \(clients.max_failures=1\): killed"):
        chunks.failed(chunk, 0, RuntimeError("killed"))


def test_an_actor_that_dies_after_its_last_client_is_nobodys_fault() -> None:
    chunks = Chunks(alone(9), 0)
    chunks.failed(chunks.take(1), 1, RuntimeError("killed"))
    assert not chunks
