"""How clients are handed to actors."""

from hypothesis import given
from hypothesis import strategies as st

from fedray.federation.work_queue import TaskGroup, WorkQueue, task_groups
from fedray.federation.worker import ClientTask
from fedray.types import Client


def assignments(*examples: int, tier: str = "default") -> list[ClientTask]:
    """Clients a, b, c, ... with these numbers of examples."""
    return [ClientTask(Client(chr(97 + i), i, n, tier), 5, measure=False) for i, n in enumerate(examples)]


def alone(*examples: int) -> list[TaskGroup]:
    return [(assignment,) for assignment in assignments(*examples)]


def names(chunk: list[TaskGroup]) -> str:
    return " ".join("".join(assignment.client.id for assignment in group) for group in chunk)


def test_groups_are_consecutive_clients_of_one_tier() -> None:
    both = [*assignments(5, 4, 3, tier="x"), *assignments(9, 8, tier="y")]
    found = task_groups(both, {"x": 2, "y": 1, "z": 4})
    assert {tier: names(entries) for tier, entries in found.items()} == {"x": "ab c", "y": "a b", "z": ""}


def test_chunks_shrink() -> None:
    """Eight clients of 9 examples, a work of 10 each, and two actors: a quarter of 80 is two clients, of 60 one (15),
    and so on; one client is the least."""
    chunks = WorkQueue(alone(*[9] * 8), 0)
    taken = []
    while chunks:
        taken.append(names(chunks.take(2)))
    assert taken == ["a b", "c", "d", "e", "f", "g", "h"]
    assert names(WorkQueue(alone(*[9] * 8), 0).take(1)) == "a b c d"


def test_chunks_are_worth_their_message_but_nobody_gets_more_than_an_equal_part() -> None:
    """Eight clients of a work of 10 and two actors: 35 is worth it, three clients; 100 would be, but half is 40."""
    chunks = WorkQueue(alone(*[9] * 8), 0)
    assert [names(chunks.take(2, 35)) for _ in range(3)] == ["a b c", "d e f", "g h"]
    chunks = WorkQueue(alone(*[9] * 8), 0)
    assert [names(chunks.take(2, 100)) for _ in range(2)] == ["a b c d", "e f g h"]


def test_a_large_client_is_a_chunk_of_its_own() -> None:
    """100 + 10 · 10: a quarter is 50; the rest, ten times 10, is shared by chunks of two and then one."""
    chunks = WorkQueue(alone(99, *[9] * 10), 0)
    assert [names(chunks.take(2)) for _ in range(4)] == ["a", "b c", "d e", "f"]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 8), st.integers(1, 5))
def test_everybody_is_handed_out_once_in_whole_groups(examples: list[int], actors: int, width: int) -> None:
    entries = task_groups(assignments(*examples), {"default": width})["default"]
    chunks = WorkQueue(entries, 0)
    taken: list[TaskGroup] = []
    while chunks:
        chunk = chunks.take(actors)
        assert chunk
        taken += chunk
    assert taken == entries
    assert [assignment for group in taken for assignment in group] == assignments(*examples)


def test_what_a_dead_actor_left_comes_back_group_by_group_and_nobody_is_blamed() -> None:
    chunks = WorkQueue(task_groups(assignments(*[9] * 8), {"default": 2})["default"], 0)
    chunk = chunks.take(1)
    assert names(chunk) == "ab cd"
    chunks.unserved(chunk[1:])
    assert [names(chunks.take(1)) for _ in range(2)] == ["cd", "ef"]
    assert names(chunks.take(1)) == "gh"
    assert not chunks


def test_who_fails_is_run_again_elsewhere_and_in_the_end_given_up() -> None:
    here, there = object(), object()
    chunks = WorkQueue(alone(9), 2)
    (group,) = chunks.take(2, actor=here)
    assert chunks.failed(group, here) == (1, False)
    assert chunks.take(2, actor=here) == []
    assert chunks.take(2, actor=there) == [group]
    assert chunks.failed(group, there) == (2, False)
    assert chunks.take(1, actor=there) == [group], "there is no other"
    assert chunks.failed(group, there) == (3, True)
    assert not chunks


def test_who_waits_for_another_actor_does_not_keep_this_one_from_others() -> None:
    here = object()
    chunks = WorkQueue(alone(9, 9), 1)
    (first,) = chunks.take(2, actor=here)
    chunks.failed(first, here)
    assert names(chunks.take(2, actor=here)) == "b"


def test_of_several_that_fail_together_each_has_one_more_try_alone() -> None:
    chunks = WorkQueue(task_groups(assignments(9, 9, 9), {"default": 3})["default"], 1)
    (group,) = chunks.take(1)
    assert chunks.failed(group) == (1, False)
    assert chunks.take(1) == [group]
    assert chunks.failed(group) == (2, False)
    assert [names(chunks.take(1)) for _ in range(2)] == ["a", "b"]
    (last,) = chunks.take(1)
    assert chunks.failed(last) == (3, True)
    assert not chunks


def test_what_is_hopeless_is_not_run_again() -> None:
    chunks = WorkQueue(task_groups(assignments(9, 9), {"default": 2})["default"], 5)
    (group,) = chunks.take(1)
    assert chunks.failed(group, non_retryable=True) == (1, False), "one of the two is at fault"
    (single,) = chunks.take(1)
    assert names([single]) == "a"
    assert chunks.failed(single, non_retryable=True)[1]
