"""The federation's order of things, with clients that the test plays, and with real ones trained in any order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_bert

from fedray.config import Config, TrainConfig, load_config
from fedray.experiment.prepare import prepare
from fedray.federation.local_pool import LocalPool
from fedray.federation.result_batches import ResultBatch
from fedray.federation.rounds import ClientsDone, Federation, RoundDone, sample_cohort
from fedray.federation.worker import ClientTask, Outcome
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


class Stage:
    """A pool whose clients only count their turns. order: of completion, from the order of the assignments."""

    def __init__(self, order: Callable[[list[Any]], list[Any]] = list):
        self.order = order
        self.assigned: list[list[ClientTask]] = []
        self.downlinks: list[Mapping[str, Any]] = []

    def train(
        self, assignments: Sequence[ClientTask], downlinks: Mapping[str, Any], states: Mapping[str, Any]
    ) -> Iterator[ResultBatch]:
        self.assigned.append(list(assignments))
        self.downlinks.append(downlinks)
        for assignment in self.order(list(assignments)):
            client = assignment.client
            report = ClientReport(client.id, assignment.server_round, 1, 1, 0.0, 0.0, None, None, {})
            outcome = Outcome(Update(client, 1, client.id), report, 0, 0, None)
            turns = states[client.id].entry + 1 if client.id in states else 1
            kept = StateRef("file", turns, 99) if assignment.keep == "state" else None
            yield ResultBatch((outcome,), (kept,), (), None, (), groups=1, seconds=1.0, last=True)

    def fetch(self, refs: Sequence[StateRef]) -> list[int]:
        return [ref.entry * 100 for ref in refs]

    def forget(self, refs: Sequence[StateRef]) -> None:
        raise AssertionError("whoever records the rounds does that")


def stage(pool: Stage, sizes: Sequence[int] = (3, 9, 5, 9, 1), **changes: Any) -> Federation:
    clients = [Client(f"c{index}", index, size) for index, size in enumerate(sizes)]
    train, up_bytes = {"default": TrainConfig()}, {"default": 0}
    return Federation(configure(**changes), Counting(), clients, "initial", pool, train, up_bytes)  # type: ignore[arg-type]


def rounds_of(federation: Federation) -> list[RoundDone]:
    return [event for event in federation.run() if isinstance(event, RoundDone)]


def test_updates_are_aggregated_in_the_order_of_ids_whoever_is_first() -> None:
    federation = stage(Stage(order=lambda assigned: assigned[2:] + assigned[1::-1]))
    done = rounds_of(federation)
    ids = ("c0", "c1", "c2", "c3", "c4")
    assert federation.server.rounds == (ids,) * 3
    assert [tuple(outcome.update.client.id for outcome in event.outcomes) for event in done] == [ids] * 4
    assert [event.metrics for event in done] == [{"seen": 5}] * 3 + [{}]


def test_every_turn_is_reported_as_it_ends_and_every_round_once() -> None:
    federation = stage(Stage(order=lambda assigned: assigned[::-1]), rounds=2)
    events = [
        (event.server_round, *event.clients) if isinstance(event, ClientsDone) else (event.server_round, event.final)
        for event in federation.run()
    ]
    turns = ["c4", "c0", "c2", "c3", "c1"]
    expected = [[*((t, id) for id in turns), (t, t == 2)] for t in range(3)]
    assert events == [event for part in expected for event in part]


def test_the_largest_clients_are_assigned_first() -> None:
    """9 and 9 by id, then 5, 3, 1."""
    pool = Stage()
    rounds_of(stage(pool))
    assert [[a.client.id for a in part] for part in pool.assigned] == [["c1", "c3", "c2", "c0", "c4"]] * 4


@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_nth_round_is_measured_and_the_final_pass_always(every: int, measured: list[int]) -> None:
    pool = Stage()
    rounds_of(stage(pool, rounds=5, evaluation__every=every))
    flags = [{a.measure for a in part} for part in pool.assigned]
    assert flags == [{t in measured} for t in range(5)] + [{True}]
    assert [{a.keep for a in part} for part in pool.assigned] == [{"state"}] * 5 + [{"adapter"}]
    assert [{a.server_round for a in part} for part in pool.assigned] == [{t} for t in range(6)]


def test_only_the_cohort_trains_and_states_follow_their_clients() -> None:
    pool = Stage()
    federation = stage(pool, rounds=6, clients__per_round=2)
    done = rounds_of(federation)
    cohorts = [[client.id for client in sample_cohort(federation.clients, federation.config, t)] for t in range(6)]
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert [[o.update.client.id for o in event.outcomes] for event in done[:-1]] == cohorts
    assert [sorted(down) for down in pool.downlinks[:-1]] == cohorts
    turns = {id: sum(id in cohort for cohort in cohorts) for id in sorted({id for cohort in cohorts for id in cohort})}
    assert list(federation.states()) == [
        *((f"client/{id}", 100 * n) for id, n in turns.items()),
        ("server", federation.server),
    ]
    replaced = [ref.entry for event in done for ref in event.replaced]
    assert sorted(replaced) == sorted(n for often in turns.values() for n in range(1, often))
    assert len(done[-1].outcomes) == 5


def test_the_final_pass_goes_to_everybody_and_changes_nothing() -> None:
    """Everybody receives what the last round made; the states that come back are dropped, nothing is aggregated."""
    pool = Stage()
    federation = stage(pool, clients__per_round=2)
    for _ in range(3):
        list(federation.round())
    before = (list(federation.states()), federation.server_round, dict(federation.client_states))
    *turns, final = federation.final_pass()
    assert (list(federation.states()), federation.server_round, dict(federation.client_states)) == before
    assert len(turns) == 5
    assert isinstance(final, RoundDone)
    assert (final.final, final.server_round, final.metrics) == (True, 3, {})
    assert pool.downlinks[-1] == {f"c{k}": (f"c{k}", 3) for k in range(5)}


def test_a_client_that_fails_is_left_out_of_its_round() -> None:
    """The pool decides who is given up: the others are aggregated, and the lost one keeps its state."""
    pool = Stage(order=lambda assigned: [a for a in assigned if a.client.id != "c2" or a.server_round == 1])
    federation = stage(pool)
    rounds_of(federation)
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
    """40 rounds of 4 of 10: everybody comes, about 16 times; less than 5 or more than 30 times has p < 1e-4."""
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
    """Trains one by one in the opposite order, and hands out in yet another one."""

    def train(self, assignments: Sequence[ClientTask], downlinks: Any, states: Any) -> Iterator[ResultBatch]:
        blocks = [
            block for entry in assignments[::-1] for block in super(Backwards, self).train([entry], downlinks, states)
        ]
        yield from blocks[1:] + blocks[:1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def trained(
    pool_class: type[LocalPool], cache: str, folder: Path, **changes: Any
) -> tuple[Federation, list[RoundDone]]:
    config = configure(data__cache_dir=cache, rounds=2, clients__per_round=3, **changes)
    prepared = prepare(config)
    pool = pool_class(prepared.data.shards)
    (folder / "states" / config.method[0].key).mkdir(parents=True)
    initial = pool.setup(prepared.worker_setups(config.method[0], StoragePath.of(folder)))
    federation = prepared.federation(config.method[0], initial, pool)
    return federation, [event for event in federation.run() if isinstance(event, RoundDone)]


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
    assert len(federation.client_states) < 5 or len({len(event.outcomes) for event in done}) > 1
    for ours, theirs in zip(done, done_again, strict=True):
        for one, other in zip(ours.outcomes, theirs.outcomes, strict=True):
            assert one.update.client == other.update.client
            assert one.report.train_loss == other.report.train_loss
            assert one.report.personalised == other.report.personalised
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
    *_, final = federation.final_pass()
    assert sha256(federation.states()) == before
    assert len(final.outcomes) == 5  # type: ignore[union-attr]
    assert len(federation.client_states) in (3, 4, 5)
    assert all(outcome.report.steps > 0 for outcome in done[-1].outcomes)
    assert all(outcome.report.aggregated and outcome.report.personalised for outcome in done[-1].outcomes)
