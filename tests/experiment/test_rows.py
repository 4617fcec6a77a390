"""What a run leaves on disk, recomputed from its own tables and from its states."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from tiny import tiny_bert

from fedray.config import Memory, load_config
from fedray.experiment.prepare import prepare
from fedray.experiment.rows import memory_row
from fedray.experiment.run import run_experiment
from fedray.experiment.run_folder import RunFolder
from fedray.federation.events import MethodFinished, MethodStarted, RoundFinished, TasksFinished
from fedray.federation.local_pool import LocalPool
from fedray.planning.memory import Footprint
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import arrays, sha256
from fedray.training.metering import MemoryUse

ROUNDS, CLIENTS, COHORT = 2, 4, 3
CHECKPOINT = ("manifest.json", "server.safetensors")
METHODS = ["local", "hft", "fedreft", "fedalt"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Four methods, two rounds of three of four clients; the synthetic clients have unequal test splits."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(
        {
            "name": "tiny",
            "rounds": ROUNDS,
            "seed": 5,
            "method": ["local", {"name": "fedhft", "label": "hft", "clusters": 3}, "fedreft", "fedalt"],
            "model": tiny_bert(max_position_embeddings=64, initializer_range=0.2),
            "data": {
                "source": "synthetic",
                "examples_per_client": 30,
                "max_length": 32,
                "cache_dir": str(folder / "cache"),
            },
            "partition": {"kind": "dirichlet", "alpha": 2.0, "test_fraction": 0.3},
            "clients": {
                "count": CLIENTS,
                "per_round": COHORT,
                "tiers": {"strong": {"share": 0.5}, "weak": {"share": 0.5, "mask_ratio": 0.5}},
            },
            "lora": {"rank": 2},
            "reft": {"rank": 2},
            "train": {"batch_size": 8, "lr": 0.02},
            "device": "cpu",
            "runtime": "inline",
        }
    )
    prepared = prepare(config)
    path = folder / "deep" / "result"
    events = list(run_experiment(prepared, LocalPool(prepared.data.shards), path))
    return SimpleNamespace(
        path=path,
        config=config,
        prepared=prepared,
        events=events,
        rounds=pd.read_parquet(path / "rounds.parquet"),
        clients=pd.read_parquet(path / "clients.parquet"),
        evaluations=pd.read_parquet(path / "evaluations.parquet"),
        summaries={entry["method"]: entry for entry in json.loads((path / "summary.json").read_text())},
    )


def test_the_files(run: SimpleNamespace) -> None:
    """Nothing temporary is left. Clients that never took part have no private state, but took an adapter home. What a
    method is continued from with more rounds: its last checkpoint, and the states that this names."""
    found = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    trained = {method: set(_turns(run, method, "train").client) for method in METHODS}
    ids = {client.id for client in run.prepared.clients}
    assert found == {
        ".lock",
        "config.yaml",
        "rounds.parquet",
        "clients.parquet",
        "evaluations.parquet",
        "memory.parquet",
        "partition.parquet",
        "versions.json",
        "summary.json",
        *(f"checkpoints/{method}/{ROUNDS:05d}/{name}" for method in METHODS for name in CHECKPOINT),
        *(f"states/{method}/{name}" for method in METHODS for name in _named_states(run.path, method)),
        *(f"adapters/{method}/server.safetensors" for method in METHODS),
        *(f"adapters/{method}/clients/{id}.safetensors" for method in METHODS for id in ids),
        *(f"adapters/{method}/states/{id}.safetensors" for method in METHODS for id in trained[method]),
    }


def _named_states(path: Path, method: str) -> set[str]:
    manifest = (path / "checkpoints" / method / f"{ROUNDS:05d}" / "manifest.json").read_text().splitlines()[0]
    return {file for file, *_ in json.loads(manifest)["client_states"].values() if file}


def test_the_configuration_reads_back(run: SimpleNamespace) -> None:
    assert load_config(run.path / "config.yaml") == run.config


def test_an_undefined_score_is_null(tmp_path: Path, run: SimpleNamespace) -> None:
    """JSON has no NaN and no infinity; perplexity, for one, can overflow."""
    folder = RunFolder(StoragePath.of(tmp_path / "run"), run.config)
    summary = next(event.summary for event in run.events if isinstance(event, MethodFinished))
    folder.finish(replace(summary, personalised_mean=math.nan, personalised_worst=math.inf))
    (entry,) = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert entry == {**vars(summary), "personalised_mean": None, "personalised_worst": None}


def _turns(run: SimpleNamespace, method: str, phase: str) -> pd.DataFrame:
    return run.clients[(run.clients.method == method) & (run.clients.phase == phase)]


def test_one_row_per_method_round_and_client(run: SimpleNamespace) -> None:
    cohorts = {}
    for method in METHODS:
        turns, final = _turns(run, method, "train"), _turns(run, method, "final")
        assert sorted(final.client) == [client.id for client in run.prepared.clients]
        assert set(final.server_round) == {ROUNDS}
        cohorts[method] = [tuple(turns[turns.server_round == t].client) for t in range(ROUNDS)]
        assert [len(cohort) for cohort in cohorts[method]] == [COHORT] * ROUNDS
        rows = run.rounds[run.rounds.method == method]
        assert rows.phase.tolist() == ["train"] * ROUNDS + ["final"]
        assert rows.server_round.tolist() == [*range(ROUNDS), ROUNDS]
        assert rows.clients.tolist() == [COHORT] * ROUNDS + [CLIENTS]
    assert len(set(map(str, cohorts.values()))) == 1


def test_a_clients_row(run: SimpleNamespace) -> None:
    """Examples are those of its shard, one epoch in batches of 8 are ⌈n / 8⌉ steps, metrics lie in [0, 1], and every
    method fills its own columns only: λ, the mixer's mean, mask size, memberships."""
    clients = {client.id: client for client in run.prepared.clients}
    for row in run.clients.itertuples():
        shard = run.prepared.data.shards[row.client]
        assert (row.num_examples, row.test_examples) == (shard.num_examples("train"), shard.num_examples("test"))
        assert row.steps == -(-row.num_examples // 8)
        assert row.tier == clients[row.client].tier
        assert row.seconds > 0
        assert row.train_loss > 0
        for metric in (row.aggregated_metric, row.personalised_metric):
            assert 0 <= metric <= 1
            assert metric * row.test_examples == pytest.approx(round(metric * row.test_examples))
        assert row.aggregated_loss > 0
        assert row.personalised_loss > 0
    used = {
        column: set(run.clients[run.clients[column].notna()].method)
        for column in ("lam", "mixer_mean", "mask_size", "clusters")
    }
    assert used == {"lam": {"fedreft"}, "mixer_mean": {"fedalt"}, "mask_size": {"hft"}, "clusters": {"hft"}}
    hft = run.clients[run.clients.method == "hft"]
    # q and v of one layer, 16 rows each: 32 where all are kept, 16 at ρ = 0.5.
    assert dict(zip(hft.tier, hft.mask_size, strict=True)) == {"strong": 32, "weak": 16}
    assert all(np.allclose(pi, [1 / 3] * 3) for pi in hft.clusters)
    lam = run.clients[run.clients.method == "fedreft"].lam
    assert set(lam) <= {0, 0.25, 0.5, 0.75, 1}
    assert run.clients.mixer_mean.dropna().between(0, 1, inclusive="neither").all()


def test_a_rounds_row_is_the_mean_of_its_clients(run: SimpleNamespace) -> None:
    for row in run.rounds.itertuples():
        turns = _turns(run, row.method, row.phase)
        turns = turns[turns.server_round == row.server_round]
        tested = turns[turns.test_examples > 0]
        assert row.train_loss == pytest.approx(turns.train_loss.mean())
        assert row.aggregated_mean == pytest.approx(tested.aggregated_metric.mean())
        assert row.personalised_mean == pytest.approx(tested.personalised_metric.mean())
        weighted = (tested.personalised_metric * tested.test_examples).sum() / tested.test_examples.sum()
        assert row.personalised_weighted_mean == pytest.approx(weighted)
        assert (row.personalised_min, row.personalised_max) == (
            tested.personalised_metric.min(),
            tested.personalised_metric.max(),
        )
        assert (row.uplink_bytes, row.downlink_bytes) == (turns.uplink_bytes.sum(), turns.downlink_bytes.sum())
        assert row.seconds > turns.seconds.sum() * 0.99
    sizes = run.rounds[(run.rounds.method == "hft") & (run.rounds.phase == "train")]
    assert sizes[["cluster_0_size", "cluster_1_size", "cluster_2_size"]].to_numpy() == pytest.approx(CLIENTS / 3)


def test_evaluations_are_those_of_the_clients_and_of_their_validation_examples(run: SimpleNamespace) -> None:
    """One row per client, moment and examples; those on test are the clients' own columns, and the round's validation
    mean is that over its clients that have validation examples."""
    table = run.evaluations
    assert set(table.metric) == {"accuracy"}
    assert set(table.group) == {""}
    keys = ["method", "phase", "server_round", "client"]
    for moment in ("aggregated", "personalised"):
        at = table[table.moment == moment]
        tests = at[at.examples == "test"].set_index(keys)
        clients = run.clients.set_index(keys).loc[tests.index]
        assert len(tests) == (run.clients.test_examples > 0).sum()
        assert tests.value.tolist() == clients[f"{moment}_metric"].tolist()
        assert tests.loss.tolist() == clients[f"{moment}_loss"].tolist()
        assert tests.num_examples.tolist() == clients.test_examples.tolist()
        validation = at[at.examples == "validation"].set_index(keys)
        for (_, _, _, client), count in validation.num_examples.items():
            assert count == run.prepared.data.shards[client].num_examples("validation")
        means = validation.value.groupby(keys[:3]).mean()
        for row in run.rounds.itertuples():
            mean = getattr(row, f"validation_{moment}_mean")
            assert mean == pytest.approx(means.loc[row.method, row.phase, row.server_round])
    final = run.rounds[run.rounds.phase == "final"].set_index("method")
    for method, entry in run.summaries.items():
        assert entry["validation_personalised_mean"] == final.validation_personalised_mean[method]
        assert entry["validation_aggregated_mean"] == final.validation_aggregated_mean[method]


def test_the_best_round_is_chosen_on_validation(run: SimpleNamespace) -> None:
    """The test score is that of the same round; on test, the choice is by the test score."""
    result = RunResult.load(run.path)
    for select_on, column in (("validation", "validation_personalised_mean"), ("test", "personalised_mean")):
        for row in result.best_rounds(select_on=select_on).itertuples():
            mine = run.rounds[(run.rounds.method == row.method) & (run.rounds.phase == "train")]
            best = mine.set_index("server_round").loc[row.server_round]
            assert best[column] == mine[column].max()
            assert (row.validation, row.test) == (best.validation_personalised_mean, best.personalised_mean)


def test_the_summary_follows_from_the_clients_table(run: SimpleNamespace) -> None:
    assert list(run.summaries) == METHODS
    tests = {row.client: row.test_examples for row in run.clients.itertuples()}
    assert len(set(tests.values())) > 1, "the weighted mean would be the plain one"
    for method, entry in run.summaries.items():
        train, final = _turns(run, method, "train"), _turns(run, method, "final")
        assert {name: entry[name] for name in ("method", "seed", "rounds", "clients", "metric_name")} == {
            "method": method,
            "seed": 5,
            "rounds": ROUNDS,
            "clients": CLIENTS,
            "metric_name": "accuracy",
        }
        assert entry["head"] == ("local" if method == "local" else "shared")
        assert entry["aggregated_mean"] == pytest.approx(final.aggregated_metric.mean())
        assert entry["personalised_mean"] == pytest.approx(final.personalised_metric.mean())
        weighted = np.average(final.personalised_metric, weights=final.test_examples)
        assert entry["personalised_weighted_mean"] == pytest.approx(weighted)
        assert entry["personalised_worst"] == final.personalised_metric.min()
        assert (entry["uplink_bytes"], entry["downlink_bytes"]) == (
            train.uplink_bytes.sum(),
            train.downlink_bytes.sum(),
        )
        assert entry["trainable_parameters"] == max(c.trainable for c in run.prepared.costs[method].values())
        assert entry["wall_seconds"] > train.seconds.sum()


def test_bytes_are_what_the_accounting_says(run: SimpleNamespace) -> None:
    """A full client's uplink; in round 0 nobody has anything to send down but heads (FedHFT: and π)."""
    turns = run.clients[(run.clients.phase == "train") & (run.clients.tier == "strong")]
    head = 4 * (4 * 16 + 4)
    for method, by_tier in run.prepared.costs.items():
        cost = by_tier["strong"]
        mine = turns[turns.method == method]
        assert set(mine.uplink_bytes) == {cost.uplink_bytes}
        assert set(mine[mine.server_round == 1].downlink_bytes) <= {cost.downlink_bytes}
    first = run.clients[(run.clients.phase == "train") & (run.clients.server_round == 0)]
    down = first.groupby("method").downlink_bytes.agg(set).to_dict()
    assert down == {"local": {0}, "fedreft": {head}, "fedalt": {head}, "hft": {head + 4 * 3}}


def test_states_and_their_hash_can_be_made_again(run: SimpleNamespace, tmp_path: Path) -> None:
    """The same experiment in a federation of its own: state_sha256 is over its states, and the files hold them."""
    for index, method in enumerate(METHODS):
        entry = run.config.method[index]
        pool = LocalPool(run.prepared.data.shards)
        (tmp_path / "states" / method).mkdir(parents=True)
        initial = pool.setup(run.prepared.worker_setups(entry, StoragePath.of(tmp_path)))
        federation = run.prepared.federation(entry, initial, pool)
        for _ in range(ROUNDS):
            list(federation.round())
        list(federation.final_pass())
        states = dict(federation.states())
        assert run.summaries[method]["state_sha256"] == sha256(states.items())
        folder = run.path / "adapters" / method
        _same(load_file(folder / "server.safetensors"), arrays(states.pop("server")))
        for name, state in states.items():
            _same(load_file(folder / "states" / f"{name.removeprefix('client/')}.safetensors"), arrays(state))
        for client in run.prepared.clients:
            name = f"adapters/{method}/clients/{client.id}.safetensors"
            _same(load_file(run.path / name), load_file(tmp_path / name))


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes()


def test_the_events_tell_the_whole_story(run: SimpleNamespace) -> None:
    turns = ROUNDS * COHORT + CLIENTS
    for method in METHODS:
        mine = [e for e in run.events if getattr(e, "method", None) == method or _summary_of(e) == method]
        started, *rest, finished = mine
        assert started == MethodStarted(method, ROUNDS, turns)
        assert isinstance(finished, MethodFinished)
        assert sum(len(event.clients) for event in rest if isinstance(event, TasksFinished)) == turns
        rounds = [event for event in rest if isinstance(event, RoundFinished)]
        assert [event.final for event in rounds] == [False] * ROUNDS + [True]
        assert rounds[-1].personalised == pytest.approx(run.summaries[method]["personalised_mean"])


def _summary_of(event: Any) -> str | None:
    return event.summary.method if isinstance(event, MethodFinished) else None


def test_a_run_that_was_ended_keeps_the_rounds_that_it_finished(tmp_path: Path, run: SimpleNamespace) -> None:
    events = run_experiment(run.prepared, LocalPool(run.prepared.data.shards), tmp_path)
    for event in events:
        if isinstance(event, RoundFinished):
            break
    events.close()  # type: ignore[attr-defined]
    assert len(pd.read_parquet(tmp_path / "rounds.parquet")) == 1
    assert len(pd.read_parquet(tmp_path / "clients.parquet")) == COHORT
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_predicted_and_measured_memory(run: SimpleNamespace) -> None:
    """One row per method and tier. How much is measured is not tested here: in a process that has run other tests, a
    small model finds room in what they freed."""
    table = pd.read_parquet(run.path / "memory.parquet")
    assert list(zip(table.method, table.tier, strict=True)) == [
        (method, tier) for method in METHODS for tier in ("strong", "weak")
    ]
    assert set(table.device) == {"cpu"}
    parts = table[["weights", "adapter", "gradients", "optimizer", "activations"]].sum(axis=1)
    assert (table.predicted_device == parts).all()
    assert (table.predicted_host == parts + table.vectors + table.offloaded).all()
    assert table.measured_device.isna().all()
    assert (table.measured_host >= 0).all()
    assert (table.host_baseline > 50e6).all()
    costs = run.prepared.costs
    for row in table.itertuples():
        cost = costs[row.method][row.tier]
        assert row.trainable_share == cost.trainable / cost.total
        assert row.gradients == 4 * cost.trainable


def test_predictions_leave_out_what_another_process_holds(run: SimpleNamespace) -> None:
    """It is not in torch's peak either."""
    cost, footprint = run.prepared.costs["local"]["weak"], Footprint(Memory(100, 7), Memory(), 0, 90, 90)
    row = memory_row("local", "weak", cost, footprint, [MemoryUse("cuda", 20, 0, 0, held_elsewhere=90)])
    assert (row["weights"], row["predicted_device"], row["measured_device"]) == (100, 17, 20)


def test_memory_that_cannot_be_predicted_is_null(run: SimpleNamespace) -> None:
    cost = run.prepared.costs["local"]["weak"]
    uses = [MemoryUse("cuda", 5, 100, 40), MemoryUse("cuda", 7, 90, 40)]
    row = memory_row("local", "weak", cost, None, uses)
    assert row["weights"] is row["predicted_device"] is row["predicted_host"] is None
    assert (row["device"], row["measured_device"], row["measured_host"]) == ("cuda", 7, 90)  # of the larger one
    assert memory_row("local", "weak", cost, None, [])["measured_host"] is None
