"""The folder of a run of any size with made-up tables, written in seconds: nothing was trained."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tiny import tiny_bert

from fedray.config import dump_yaml, load_config
from fedray.federation.summary import Summary
from fedray.results.run_result import RunResult

TEST_EXAMPLES = 40


def large_run(folder: Path, methods: int, rounds: int, clients: int, classes: int = 150) -> RunResult:
    """Write the tables of a run in which every client takes part in every round, and read its result.

    The methods differ, the clients have shares of `TEST_EXAMPLES`, and the losses fall. Every method records a number,
    and every tenth one a list.
    """
    names = ["local", "fedavg", *(f"method_{number:02d}" for number in range(methods - 2))]
    entries = ["local", *({"name": "fedavg", "label": name} for name in names[1:])]
    raw = {"name": "large", "rounds": rounds, "method": entries, "model": tiny_bert(), "data": {"source": "synthetic"}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(load_config(raw | {"clients": {"count": clients}})))
    rng = np.random.default_rng(0)
    _write_clients(folder, names, rounds, clients, rng)
    _write_rounds(folder, names, rounds, clients, rng)
    memory = [
        {
            **{"method": name, "tier": "default", "device": "cpu", "trainable_share": 0.01},
            **{"predicted_device": 9e8, "measured_device": None, "predicted_host": 1e9 + i, "measured_host": 1.1e9},
        }
        for i, name in enumerate(names)
    ]
    pd.DataFrame(memory).to_parquet(folder / "memory.parquet")
    _write_partition(folder, clients, classes, rng)
    events = [
        {
            **{"time": datetime(2026, 1, 1, tzinfo=UTC), "method": names[i % methods], "server_round": i % rounds},
            **{"clients": [f"client_{i % clients:04d}"], "attempt": 1, "node": "node", "kind": "process died"},
            **{"cause": "out of memory <b>", "action": "tried again"},
        }
        for i in range(1000)
    ]
    pd.DataFrame(events).to_parquet(folder / "events.parquet")
    fields: dict[str, Any] = dict.fromkeys(Summary.__dataclass_fields__, 0.5)
    fields |= {"seed": 0, "rounds": rounds, "clients": clients, "head": "shared", "metric_name": "accuracy"}
    fields |= {"trainable_parameters": 1000, "uplink_bytes": 10**9, "downlink_bytes": 10**9, "data_sha256": "data"}
    summaries = [asdict(Summary(**fields | {"method": name, "state_sha256": name})) for name in names]
    (folder / "summary.json").write_text(json.dumps(summaries))
    return RunResult.load(folder)


def _write_clients(folder: Path, names: list[str], rounds: int, clients: int, rng: np.random.Generator) -> None:
    each = (rounds + 1) * clients
    ids = pa.array([f"client_{i:04d}" for i in range(clients)])
    numbers = np.repeat(np.arange(rounds + 1), clients)
    phases = pa.array(["train", "final"]).take(pa.array((numbers == rounds).astype(int)))
    with pq.ParquetWriter(folder / "clients.parquet", _client_schema()) as writer:
        for index, name in enumerate(names):
            skill = 0.5 + 0.4 * index / len(names)
            score = rng.binomial(TEST_EXAMPLES, np.clip(skill * (1 - 0.5 ** (1 + numbers / 10)), 0, 1)) / TEST_EXAMPLES
            lists = [[0.25, 0.75]] * each if index % 10 == 0 else [None] * each
            columns = {
                "method": pa.array([name] * each),
                "phase": phases,
                "server_round": numbers,
                "client": ids.take(pa.array(np.tile(np.arange(clients), rounds + 1))),
                "aggregated_metric": score / 2,
                "personalised_metric": score,
                "test_examples": np.full(each, float(TEST_EXAMPLES)),
                "lam": rng.integers(5, size=each) / 4,
                "clusters": pa.array(lists, pa.list_(pa.float64())),
            }
            writer.write_table(pa.table(columns, schema=_client_schema()))


def _client_schema() -> pa.Schema:
    texts = {name: pa.string() for name in ("method", "phase", "client")}
    numbers = ("aggregated_metric", "personalised_metric", "test_examples", "lam")
    return pa.schema(
        texts
        | {"server_round": pa.int64()}
        | {name: pa.float64() for name in numbers}
        | {"clusters": pa.list_(pa.float64())}
    )


def _write_rounds(folder: Path, names: list[str], rounds: int, clients: int, rng: np.random.Generator) -> None:
    numbers = np.arange(rounds + 1)
    tables = []
    for index, name in enumerate(names):
        mean = (0.5 + 0.4 * index / len(names)) * (1 - 0.5 ** (1 + numbers / 10)) + rng.normal(0, 0.01, rounds + 1)
        columns = {
            "method": name,
            "phase": np.where(numbers == rounds, "final", "train"),
            "server_round": numbers,
            "clients": clients,
            "late": rng.integers(5, size=rounds + 1),
            "dropped_out": rng.integers(3, size=rounds + 1),
            "left_out": 0,
            "simulated_seconds": rng.uniform(5, 50, rounds + 1),
            "train_loss": 3 * 0.97**numbers + rng.uniform(0, 0.1, rounds + 1),
            "aggregated_mean": mean / 2,
            "personalised_mean": mean,
            "uplink_bytes": (index > 0) * 10**6 * (index + 1),
            "downlink_bytes": (index > 0) * 10**6 * (index + 1),
            "seconds": 1.0,
        }
        tables.append(pd.DataFrame(columns))
    pd.concat(tables).to_parquet(folder / "rounds.parquet")


def _write_partition(folder: Path, clients: int, classes: int, rng: np.random.Generator) -> None:
    rows = []
    for client in range(clients):
        for split, examples in (("train", 80), ("validation", 10), ("test", TEST_EXAMPLES)):
            at = {"client": f"client_{client:04d}", "tier": "default", "split": split}
            counts = rng.multinomial(examples, rng.dirichlet(np.full(classes, 0.1)))
            rows.append({**at, "kind": "all", "name": "", "examples": examples})
            rows += [
                {**at, "kind": "class", "name": f"class_{number:03d}", "examples": int(count)}
                for number, count in enumerate(counts)
                if count
            ]
    pd.DataFrame(rows).to_parquet(folder / "partition.parquet")
