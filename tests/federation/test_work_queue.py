"""How client tasks are given to actors."""

from hypothesis import given
from hypothesis import strategies as st

from fedray.federation.tasks import ClientTask, Downlink
from fedray.federation.work_queue import TaskGroup, Throughput, WorkQueue, task_groups
from fedray.types import Client


def tasks(*examples: int, tier: str = "default") -> list[ClientTask]:
    """Clients a, b, c, ... with these numbers of examples."""
    sent = Downlink(0, None, 0)
    return [ClientTask(Client(chr(97 + i), i, n, tier), 5, sent, measure=False) for i, n in enumerate(examples)]


def alone(*examples: int) -> list[TaskGroup]:
    return [(task,) for task in tasks(*examples)]


def names(batch: list[TaskGroup]) -> str:
    return " ".join("".join(task.client.id for task in group) for group in batch)


def test_groups_are_consecutive_clients_of_one_tier() -> None:
    both = [*tasks(5, 4, 3, tier="x"), *tasks(9, 8, tier="y")]
    found = task_groups(both, {"x": 2, "y": 1, "z": 4})
    assert {tier: names(entries) for tier, entries in found.items()} == {"x": "ab c", "y": "a b", "z": ""}


def test_batches_shrink() -> None:
    """Eight clients of 9 examples, a work of 10 each, and two actors: a quarter of 80 is two clients, of 60 one (15),
    and so on; a batch has at least one client."""
    queue = WorkQueue(alone(*[9] * 8), 0)
    taken = []
    while queue:
        taken.append(names(queue.next_batch(2)))
    assert taken == ["a b", "c", "d", "e", "f", "g", "h"]
    assert names(WorkQueue(alone(*[9] * 8), 0).next_batch(1)) == "a b c d"


def test_a_batch_has_at_least_the_work_that_is_worth_a_message() -> None:
    """Two clients of 9 examples, a work of 20, took 2 s: 4 s are a work of 40, four of the clients."""
    throughput = Throughput()
    assert throughput.work_in(4) == 0
    throughput.record([task.client for task in tasks(9, 9)], 2.0)
    assert throughput.work_in(4) == 40
    queue = WorkQueue(alone(*[9] * 10), 0)
    assert [names(queue.next_batch(5, least=40)) for _ in range(3)] == ["a b c d", "e f g h", "i j"]


def test_small_work_is_shared_by_all_idle_actors() -> None:
    """Ten clients of 9 examples, a work of 100, all of it less than a batch should have: each of three idle actors gets
    the whole clients within its share of what is left."""
    queue = WorkQueue(alone(*[9] * 10), 0)
    assert [names(queue.next_batch(3, least=1000, idle=idle)) for idle in (3, 2, 1)] == ["a b c", "d e f", "g h i j"]


def test_a_large_client_is_a_batch_of_its_own() -> None:
    """100 + 10 · 10: a quarter is 50; the rest, ten times 10, is shared by batches of two and then one."""
    queue = WorkQueue(alone(99, *[9] * 10), 0)
    assert [names(queue.next_batch(2)) for _ in range(4)] == ["a", "b c", "d e", "f"]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 8), st.integers(1, 5))
def test_every_task_is_given_out_once_in_whole_groups(examples: list[int], actors: int, width: int) -> None:
    entries = task_groups(tasks(*examples), {"default": width})["default"]
    queue = WorkQueue(entries, 0)
    taken: list[TaskGroup] = []
    while queue:
        batch = queue.next_batch(actors)
        assert batch
        taken += batch
    assert taken == entries
    assert [task for group in taken for task in group] == tasks(*examples)


def test_what_a_dead_actor_left_is_requeued_group_by_group_and_not_counted_as_failed() -> None:
    queue = WorkQueue(task_groups(tasks(*[9] * 8), {"default": 2})["default"], 0)
    batch = queue.next_batch(1)
    assert names(batch) == "ab cd"
    queue.requeue(batch[1:])
    assert [names(queue.next_batch(1)) for _ in range(2)] == ["cd", "ef"]
    assert names(queue.next_batch(1)) == "gh"
    assert not queue


def test_a_failed_group_is_run_again_on_another_actor_and_in_the_end_exhausted() -> None:
    here, there = object(), object()
    queue = WorkQueue(alone(9), 2)
    (group,) = queue.next_batch(2, actor=here)
    assert queue.record_failure(group, here) == (1, False)
    assert queue.next_batch(2, actor=here) == []
    assert queue.next_batch(2, actor=there) == [group]
    assert queue.record_failure(group, there) == (2, False)
    assert queue.next_batch(1, actor=there) == [group], "there is no other"
    assert queue.record_failure(group, there) == (3, True)
    assert not queue


def test_a_group_that_waits_for_another_actor_does_not_keep_this_one_from_others() -> None:
    here = object()
    queue = WorkQueue(alone(9, 9), 1)
    (first,) = queue.next_batch(2, actor=here)
    queue.record_failure(first, here)
    assert names(queue.next_batch(2, actor=here)) == "b"


def test_of_clients_that_fail_together_each_has_one_more_attempt_alone() -> None:
    queue = WorkQueue(task_groups(tasks(9, 9, 9), {"default": 3})["default"], 1)
    (group,) = queue.next_batch(1)
    assert queue.record_failure(group) == (1, False)
    assert queue.next_batch(1) == [group]
    assert queue.record_failure(group) == (2, False)
    assert [names(queue.next_batch(1)) for _ in range(2)] == ["a", "b"]
    (last,) = queue.next_batch(1)
    assert queue.record_failure(last) == (3, True)
    assert not queue


def test_a_failure_that_would_come_again_is_not_run_again() -> None:
    queue = WorkQueue(task_groups(tasks(9, 9), {"default": 2})["default"], 5)
    (group,) = queue.next_batch(1)
    assert queue.record_failure(group, non_retryable=True) == (1, False), "one of the two is at fault"
    (single,) = queue.next_batch(1)
    assert names([single]) == "a"
    assert queue.record_failure(single, non_retryable=True)[1]
