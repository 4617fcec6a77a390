"""How clients are handed to actors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.chunks import Chunks
from fedray.errors import ClientFailure
from fedray.types import Client
from fedray.worker import Assignment


def assignments(*examples: int) -> list[Assignment]:
    """Clients a, b, c, ... with these numbers of examples."""
    return [Assignment(Client(chr(97 + i), i, n), 5, measure=False) for i, n in enumerate(examples)]


def names(chunk: list[Assignment]) -> str:
    return "".join(assignment.client.id for assignment in chunk)


def test_chunks_shrink() -> None:
    """Eight clients of 9 examples, a work of 10 each, and two actors: a quarter of 80 is two clients, of 60 one (15),
    and so on; one client is the least."""
    chunks = Chunks(assignments(*[9] * 8), 0)
    taken = []
    while chunks:
        taken.append(names(chunks.take(2)))
    assert taken == ["ab", "c", "d", "e", "f", "g", "h"]
    assert names(Chunks(assignments(*[9] * 8), 0).take(1)) == "abcd"


def test_a_large_client_is_a_chunk_of_its_own() -> None:
    """100 + 10 · 10: a quarter is 50; the rest, ten times 10, is shared by chunks of two and then one."""
    chunks = Chunks(assignments(99, *[9] * 10), 0)
    assert [names(chunks.take(2)) for _ in range(4)] == ["a", "bc", "de", "f"]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 8))
def test_everybody_is_handed_out_once(examples: list[int], actors: int) -> None:
    chunks = Chunks(assignments(*examples), 0)
    taken: list[Assignment] = []
    while chunks:
        chunk = chunks.take(actors)
        assert chunk
        taken += chunk
    assert taken == assignments(*examples)


def test_what_a_dead_actor_left_comes_back_one_by_one_and_nobody_is_blamed() -> None:
    chunks = Chunks(assignments(9, 9, 9, 9), 0)
    chunk = chunks.take(1)
    assert names(chunk) == "ab"
    chunks.failed(chunk, chunk[1:], RuntimeError("killed"))
    assert [names(chunks.take(1)) for _ in range(2)] == ["b", "c"]
    assert names(chunks.take(1)) == "d"
    assert not chunks


def test_a_client_that_was_alone_with_its_actor_is_blamed() -> None:
    chunks = Chunks(assignments(9), 1)
    chunk = chunks.take(1)
    chunks.failed(chunk, chunk, RuntimeError("killed"))
    chunk = chunks.take(1)
    with pytest.raises(ClientFailure, match=r"'a'.* died 2 times in round 5 \(clients.max_failures=1\): killed"):
        chunks.failed(chunk, chunk, RuntimeError("killed"))
