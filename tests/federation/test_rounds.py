"""Rounds of a federation, with clients that the test plays, and with real ones trained in any order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from round_result import all_results, result_of
from tiny import tiny_bert

from fedray.config import Config, TrainConfig, load_config
from fedray.experiment.prepare import prepare
from fedray.federation.events import TasksFinished
from fedray.federation.failures import FailedAttempt
from fedray.federation.local_pool import LocalPool
from fedray.federation.result_batches import ResultBatch
from fedray.federation.rounds import Federation, Round, RoundResult, sample_cohort
from fedray.federation.tasks import ClientResult, ClientTask
from fedray.methods.protocol import Update
from fedray.storage.client_states import StateRef
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import sha256
from fedray.training.trainer import ClientReport
from fedray.types import Client

BASE = {
    "rounds": 3,
    "method": "local",
    "model": tiny_bert(max_position_embeddings=64, initializer_range=0.2),
    "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
    "partition": {"kind": "by_file"},
    "clients": {"count": 5},
    "lora": {"rank": 2, "dropout": 0.1},
    "train": {"batch_size": 4, "lr": 0.02},
    "evaluation": {"every": 0},
    "device": "cpu",
    "runtime": "inline",
}


def configure(**changes: Any) -> Config:
    return load_config(BASE, {path.replace("__", "."): value for path, value in changes.items()})


# ---------------------------------------------------------------- clients that the test plays


@dataclass(frozen=True)
class Counted:
    """Server state: what each aggregation saw. Client state: how often it trained."""

    rounds: tuple[tuple[str, ...], ...] = ()


class Counting:
    """A method whose downlink is its server's history and whose uplink is the client's id."""

    def init_server(self, initial: Any, clients: Sequence[Client]) -> Counted:
        assert initial == "initial"
        return Counted()

    def configure_train(self, server: Counted, cohort: Sequence[Client]) -> Mapping[str, Any]:
        return {client.id: (client.id, len(server.rounds)) for client in cohort}

    def aggregate_train(self, server: Counted, updates: Sequence[Update[str]]) -> tuple[Counted, Mapping[str, float]]:
        assert all(update.payload == update.client.id for update in updates)
        return Counted((*server.rounds, tuple(update.payload for update in updates))), {"seen": len(updates)}


class CountingPool:
    """A pool whose clients only count how often they train. order: of completion, from the order of the tasks."""

    def __init__(self, order: Callable[[list[Any]], list[Any]] = list):
        self.order = order
        self.tasks: list[list[ClientTask]] = []

    @property
    def downlinks(self) -> list[dict[str, Any]]:
        """By round, what each client received."""
        return [{task.client.id: task.downlink.payload for task in tasks} for tasks in self.tasks]

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ResultBatch]:
        self.tasks.append(list(tasks))
        for task in self.order(list(tasks)):
            client, report = task.client, ClientReport(1, 0.0, 0.0, {}, {})
            times = 1 if task.state is None else task.state.entry + 1
            state = StateRef("file", times, 99) if task.keep == "state" else None
            result = ClientResult(client, task.server_round, 1, client.id, 0, 0, report, state)
            yield ResultBatch((result,), (), None, (), groups=1, last=True, seconds=0.0)

    def fetch(self, refs: Sequence[StateRef]) -> list[int]:
        return [ref.entry * 100 for ref in refs]

    def forget(self, refs: Sequence[StateRef]) -> None:
        raise AssertionError("the caller that records the rounds does that")


def counting(pool: CountingPool, sizes: Sequence[int] = (3, 9, 5, 9, 1), **changes: Any) -> Federation:
    clients = [Client(f"c{index}", index, size) for index, size in enumerate(sizes)]
    train, up_bytes = {"default": TrainConfig()}, {"default": 0}
    parts: Any = (Counting(), clients, "initial", pool, train, up_bytes)
    return Federation(configure(**changes), "counting", *parts)


def test_updates_are_aggregated_in_the_order_of_ids_whichever_client_is_first() -> None:
    federation = counting(CountingPool(order=lambda tasks: tasks[2:] + tasks[1::-1]))
    done = all_results(federation)
    ids = ("c0", "c1", "c2", "c3", "c4")
    assert federation.server.rounds == (ids,) * 3
    assert [tuple(result.client.id for result in round.results) for round in done] == [ids] * 4
    assert [round.metrics for round in done] == [{"seen": 5}] * 3 + [{}]


def test_every_task_is_reported_as_it_ends_and_every_round_once() -> None:
    federation = counting(CountingPool(order=lambda tasks: tasks[::-1]), rounds=2)
    events: list[tuple[Any, ...]] = []

    def followed(round: Round) -> Round:
        done = yield from round
        events.append((done.server_round, done.final))
        return done

    for begin in (federation.round, federation.round, federation.final_pass):
        for event in followed(begin()):
            assert isinstance(event, TasksFinished)
            assert event.method == "counting"
            events.append((event.server_round, *event.clients))
    expected = [[*((t, id) for id in ["c4", "c0", "c2", "c3", "c1"]), (t, t == 2)] for t in range(3)]
    assert events == [event for part in expected for event in part]


def test_the_tasks_of_the_largest_clients_are_first() -> None:
    """9 and 9 by id, then 5, 3, 1."""
    pool = CountingPool()
    all_results(counting(pool))
    assert [[task.client.id for task in tasks] for tasks in pool.tasks] == [["c1", "c3", "c2", "c0", "c4"]] * 4


@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_nth_round_is_measured_and_the_final_pass_always(every: int, measured: list[int]) -> None:
    pool = CountingPool()
    all_results(counting(pool, rounds=5, evaluation__every=every))
    flags = [{task.measure for task in tasks} for tasks in pool.tasks]
    assert flags == [{t in measured} for t in range(5)] + [{True}]
    assert [{task.keep for task in tasks} for tasks in pool.tasks] == [{"state"}] * 5 + [{"adapter"}]
    assert [{task.server_round for task in tasks} for tasks in pool.tasks] == [{t} for t in range(6)]


def test_only_the_cohort_trains_and_states_follow_their_clients() -> None:
    pool = CountingPool()
    federation = counting(pool, rounds=6, clients__per_round=2)
    done = all_results(federation)
    cohorts = [[client.id for client in sample_cohort(federation.clients, federation.config, t)] for t in range(6)]
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert [[result.client.id for result in round.results] for round in done[:-1]] == cohorts
    assert [sorted(down) for down in pool.downlinks[:-1]] == cohorts
    times = {id: sum(id in cohort for cohort in cohorts) for id in sorted({id for cohort in cohorts for id in cohort})}
    assert list(federation.states()) == [
        *((f"client/{id}", 100 * n) for id, n in times.items()),
        ("server", federation.server),
    ]
    replaced = [ref.entry for round in done for ref in round.replaced]
    assert sorted(replaced) == sorted(n for often in times.values() for n in range(1, often))
    assert len(done[-1].results) == 5


def test_the_final_pass_has_all_clients_and_changes_nothing() -> None:
    """All clients receive what the last round made; the states that come back are dropped, nothing is aggregated."""
    pool = CountingPool()
    federation = counting(pool, clients__per_round=2)
    for _ in range(3):
        result_of(federation.round())
    before = (list(federation.states()), federation.server_round, dict(federation.client_states))
    final = result_of(federation.final_pass())
    assert (list(federation.states()), federation.server_round, dict(federation.client_states)) == before
    assert len(final.results) == 5
    assert (final.final, final.server_round, final.metrics) == (True, 3, {})
    assert pool.downlinks[-1] == {f"c{k}": (f"c{k}", 3) for k in range(5)}


def test_a_client_that_fails_is_left_out_of_its_round() -> None:
    """The pool decides which client is left out: that one keeps its state, and the others are aggregated."""
    pool = CountingPool(order=lambda tasks: [t for t in tasks if t.client.id != "c2" or t.server_round == 1])
    federation = counting(pool)
    all_results(federation)
    assert federation.server.rounds == (
        ("c0", "c1", "c3", "c4"),
        ("c0", "c1", "c2", "c3", "c4"),
        ("c0", "c1", "c3", "c4"),
    )
    assert federation.client_states["c2"].entry == 1


# ---------------------------------------------------------------- cohorts


def cohorts(count: int = 40, **changes: Any) -> list[list[str]]:
    config = configure(clients__count=10, **{"clients__per_round": 4, **changes})
    clients = [Client(f"c{index}", index, 1) for index in range(10)]
    return [[client.id for client in sample_cohort(clients, config, t)] for t in range(count)]


def test_cohorts_are_drawn_without_replacement_in_the_order_of_ids() -> None:
    """40 rounds of 4 of 10: every client is drawn, about 16 times; less than 5 or more than 30 times has p < 1e-4."""
    drawn = cohorts()
    assert all(len(set(cohort)) == 4 and cohort == sorted(cohort) for cohort in drawn)
    often = [sum(f"c{index}" in cohort for cohort in drawn) for index in range(10)]
    assert sum(often) == 160
    assert min(often) >= 5
    assert max(often) <= 30


def test_cohorts_follow_from_seed_and_round_alone() -> None:
    """Not from the method, so that all methods of a comparison train the same clients."""
    assert cohorts() == cohorts() == cohorts(method="fedhft", train__lr=0.5, rounds=99)
    assert cohorts(seed=1) != cohorts(seed=2)
    assert len({tuple(cohort) for cohort in cohorts()}) > 10
    everybody = [[f"c{index}" for index in range(10)]] * 2
    assert cohorts(2, clients__per_round=None) == everybody


# ---------------------------------------------------------------- real clients


class Backwards(LocalPool):
    """Trains one by one in the opposite order, and yields the results in yet another one."""

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ResultBatch | FailedAttempt]:
        batches = [batch for task in tasks[::-1] for batch in super(Backwards, self).train([task])]
        yield from batches[1:] + batches[:1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def trained(
    pool_class: type[LocalPool], cache: str, folder: Path, **changes: Any
) -> tuple[Federation, list[RoundResult]]:
    config = configure(data__cache_dir=cache, rounds=2, clients__per_round=3, **changes)
    prepared = prepare(config)
    pool = pool_class(prepared.data.shards)
    (folder / "states" / config.method[0].key).mkdir(parents=True)
    initial = pool.setup(prepared.worker_setups(config.method[0], StoragePath.of(folder)))
    federation = prepared.federation(config.method[0], initial, pool)
    return federation, all_results(federation)


@pytest.mark.parametrize(
    "method",
    [
        "fedavg",
        "fedreft",
        "fedalt",
        {"name": "fedhft", "warmup_rounds": 0},
        {"name": "fedhft", "timing": "pre"},
        "head_only",
    ],
)
def test_results_do_not_depend_on_the_order_of_completion(method: Any, cache: str, tmp_path: Path) -> None:
    changes = {"method": method, "clients__tiers": {"a": {"share": 0.5}, "b": {"share": 0.5, "mask_ratio": 0.4}}}
    federation, done = trained(LocalPool, cache, tmp_path / "one", **changes)
    again, done_again = trained(Backwards, cache, tmp_path / "other", **changes)
    assert sha256(federation.states()) == sha256(again.states())
    assert len(federation.client_states) < 5 or len({len(round.results) for round in done}) > 1
    for ours, theirs in zip(done, done_again, strict=True):
        for one, other in zip(ours.results, theirs.results, strict=True):
            assert one.client == other.client
            assert one.report.train_loss == other.report.train_loss
            assert one.report.evaluation("personalised") == other.report.evaluation("personalised")
    mine, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / run / "adapters").rglob("*.safetensors")}
        for run in ("one", "other")
    )
    assert len(mine) == 5
    assert mine == theirs


def test_the_same_seed_gives_the_same_bits_and_another_one_others(cache: str, tmp_path: Path) -> None:
    folders = (tmp_path / name for name in "abc")
    runs = [trained(LocalPool, cache, next(folders), method="fedavg", seed=seed)[0] for seed in (0, 0, 1)]
    shas = [sha256(federation.states()) for federation in runs]
    assert shas[0] == shas[1] != shas[2]


def test_the_final_pass_of_real_clients_changes_no_state(cache: str, tmp_path: Path) -> None:
    """Although every client trains in it: the server and those who took part are as they were."""
    federation, done = trained(LocalPool, cache, tmp_path, method="fedalt")
    before = sha256(federation.states())
    final = result_of(federation.final_pass())
    assert sha256(federation.states()) == before
    assert len(final.results) == 5
    assert len(federation.client_states) in (3, 4, 5)
    assert all(result.report.steps > 0 for result in done[-1].results)
    assert all(
        result.report.evaluation("aggregated") and result.report.evaluation("personalised")
        for result in done[-1].results
    )
