"""What the figures are made of: the tables of runs on one data set, reduced while they are read.

A table of clients may have millions of rows. Only its needed columns are read, and only quantiles over the clients and
the final pass are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fedray.config import Metric
from fedray.errors import StateError
from fedray.evaluation.metrics import configured_metric
from fedray.results.run_result import RunResult
from fedray.storage.tables import read_table

OF_A_CLIENT = frozenset(
    (
        *("method", "phase", "server_round", "client", "tier", "num_examples", "steps", "seconds", "simulated_seconds"),
        *("train_loss", "aggregated_loss", "aggregated_metric", "personalised_loss", "personalised_metric"),
        *("test_examples", "uplink_bytes", "downlink_bytes"),
    )
)
"""Columns of clients.parquet that every method has; the others are what methods record."""
OF_A_ROUND = frozenset(
    (
        *("method", "phase", "server_round", "clients", "late", "dropped_out", "left_out", "simulated_seconds"),
        *("train_loss", "uplink_bytes", "downlink_bytes", "seconds"),
    )
)
"""Columns of rounds.parquet that every method has, apart from means of scores."""
MEANS = ("aggregated_mean", "personalised_mean", "personalised_weighted_mean", "personalised_min", "personalised_max")
PREFIXES = ("", "validation_", "common_")
READ = (
    "method",
    "phase",
    "server_round",
    "client",
    "tier",
    "aggregated_metric",
    "personalised_metric",
    "test_examples",
)
"""Columns of clients.parquet that the figures need, besides what methods record."""
QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}
"""Of the clients, by name."""
FEW_CLIENTS = 200
"""Up to this number of clients, single clients are followed over rounds."""


@dataclass(frozen=True)
class RunTables:
    """The tables of runs on one data set, each with a column `run`, the index of the run.

    Attributes:
        methods: in the order of the configurations.
        rounds: rounds.parquet, with `sent` and `elapsed`: bytes and simulated seconds until the end of the round.
        final: the final pass, a row per method and client: aggregated, personalised.
        quantiles: per method, round and moment, quantiles over the clients' scores (`QUANTILES`).
        recorded: per method, name and round, quantiles over the clients of a number that the method recorded.
        components: per method, name, round and component, the mean over clients of the lists that the method recorded.
        choices: per method, name, round and client of the first run, the largest component of a list, or a recorded
            cluster; empty above `FEW_CLIENTS`.
        server: per method, name and round, what the method's server reported.
        memory, events, partition: as in the run's folder; empty where a run has none.
    """

    runs: tuple[RunResult, ...]
    metric: Metric
    methods: tuple[str, ...]
    rounds: pd.DataFrame
    final: pd.DataFrame
    quantiles: pd.DataFrame
    recorded: pd.DataFrame
    components: pd.DataFrame
    choices: pd.DataFrame
    server: pd.DataFrame
    memory: pd.DataFrame
    events: pd.DataFrame
    partition: pd.DataFrame

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        return tuple(sorted({run.config.seed for run in self.runs}))


def read_runs(runs: Sequence[RunResult]) -> RunTables:
    """Read the tables of at least one run; all are on one data set.

    Raises:
        StateError: a table that every run has is missing, or cannot be read.
    """
    methods = tuple(dict.fromkeys(entry.key for run in runs for entry in run.config.method))
    finished = {summary.method for run in runs for summary in run.summaries}
    clients = [_clients(run) for run in runs]
    rounds = _joined([_with_totals(_table(run, "rounds", True)) for run in runs])
    return RunTables(
        runs=tuple(runs),
        metric=configured_metric(runs[0].config),
        methods=tuple(method for method in methods if method in finished),
        rounds=rounds,
        final=_joined([_final(table) for table in clients]),
        quantiles=_joined([_quantiles(table) for table in clients]),
        recorded=_joined([_recorded(table) for table in clients]),
        components=_joined([_components(table) for table in clients]),
        choices=_choices(clients[0]),
        server=_server(rounds),
        memory=_joined([_table(run, "memory") for run in runs]),
        events=_joined([_table(run, "events") for run in runs]),
        partition=_table(runs[0], "partition"),
    )


def _table(run: RunResult, name: str, needed: bool = False) -> pd.DataFrame:
    table = read_table(run.place, name)
    if needed and not table.num_columns:
        raise StateError(f"{run.place / f'{name}.parquet'}: does not exist")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the tables of all runs as one, with the column `run`."""
    found = [table.assign(run=index) for index, table in enumerate(tables) if not table.empty]
    return pd.concat(found, ignore_index=True) if found else tables[0].assign(run=pd.Series(dtype=int))


def _with_totals(rounds: pd.DataFrame) -> pd.DataFrame:
    """Return rounds.parquet with what was sent, and the simulated time, from the first round to each. The final pass
    sends nothing to the server, and adds nothing."""
    counted = rounds["phase"] == "train"
    sent = (rounds["uplink_bytes"] + rounds["downlink_bytes"]).where(counted, 0)
    seconds = rounds["simulated_seconds"].astype(float).where(counted, 0)
    keys = rounds["method"]
    return rounds.assign(sent=sent.groupby(keys).cumsum(), elapsed=seconds.groupby(keys).cumsum())


def _clients(run: RunResult) -> pa.Table:
    """Return what the figures need of clients.parquet."""
    table = read_table(run.place, "clients", lambda name: name in READ or name not in OF_A_CLIENT)
    if not table.num_columns:
        raise StateError(f"{run.place / 'clients.parquet'}: does not exist")
    if "server_round" not in table.column_names:
        raise StateError(f"{run.place / 'clients.parquet'}: has no column server_round")
    return table


def _final(clients: pa.Table) -> pd.DataFrame:
    rows = clients.filter(pc.equal(clients["phase"], "final"))
    names = [name for name in READ if name in rows.column_names]
    frame: pd.DataFrame = rows.select(names).to_pandas()
    frame = frame.rename(columns={f"{moment}_metric": moment for moment in ("aggregated", "personalised")})
    for moment in ("aggregated", "personalised"):
        frame[moment] = _numbers(frame[moment]) if moment in frame else np.nan
    return frame


def _numbers(values: pd.Series) -> pd.Series:
    """Return a column as float64, NaN where there is no finite number."""
    return pd.to_numeric(values).astype(float).where(lambda found: np.isfinite(found))


def _quantiles(clients: pa.Table) -> pd.DataFrame:
    found = []
    for moment in ("aggregated", "personalised"):
        if (name := f"{moment}_metric") in clients.column_names:
            found.append(_over_clients(clients, name).assign(moment=moment))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _over_clients(clients: pa.Table, name: str) -> pd.DataFrame:
    """Return the quantiles over clients of a column, by method and round; rounds without a value are missing."""
    valid = clients.filter(pc.is_valid(clients[name])).select(["method", "server_round", name])
    frame = valid.set_column(0, "method", valid["method"].dictionary_encode()).to_pandas()
    frame[name] = _numbers(frame[name])
    if (known := frame.dropna()).empty:
        return pd.DataFrame(columns=["method", "server_round", *QUANTILES])
    grouped = known.groupby(["method", "server_round"], observed=True)[name]
    table: pd.DataFrame = grouped.quantile(list(QUANTILES.values())).unstack().set_axis(list(QUANTILES), axis=1)
    return table.reset_index().astype({"method": str})


def _own(clients: pa.Table, lists: bool) -> list[str]:
    """Return the names of what methods recorded: numbers, or lists of numbers."""

    def fits(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return lists and _is_number(kind.value_type)
        return not lists and _is_number(kind)

    return [field.name for field in clients.schema if field.name not in OF_A_CLIENT and fits(field.type)]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _recorded(clients: pa.Table) -> pd.DataFrame:
    found = [_over_clients(clients, name).assign(name=name) for name in _own(clients, lists=False)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _list_values(clients: pa.Table, name: str) -> pd.DataFrame:
    """Return the values of a column of lists: method, server_round, client, component, value."""
    rows = clients.filter(pc.is_valid(clients[name])).combine_chunks()
    lengths = pc.list_value_length(rows[name]).to_numpy()
    starts = np.cumsum(lengths) - lengths
    keys = rows.select(["method", "server_round", "client"]).to_pandas()
    frame = keys.loc[np.repeat(np.arange(len(keys)), lengths)].reset_index(drop=True)
    component = np.arange(len(frame)) - np.repeat(starts, lengths)
    values = pc.list_flatten(rows[name]).to_numpy(zero_copy_only=False)
    known: pd.DataFrame = frame.assign(component=component, value=values).dropna(subset=["value"])
    return known


def _components(clients: pa.Table) -> pd.DataFrame:
    found = []
    for name in _own(clients, lists=True):
        values = _list_values(clients, name)
        by = values.groupby(["method", "server_round", "component"], sort=False)["value"]
        found.append(by.mean().rename("mean").reset_index().assign(name=name))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _choices(clients: pa.Table) -> pd.DataFrame:
    if pc.count_distinct(clients["client"]).as_py() > FEW_CLIENTS:
        return pd.DataFrame()
    found = []
    for name in _own(clients, lists=True):
        values = _list_values(clients, name)
        if not values.empty:
            largest = values.loc[values.groupby(["method", "server_round", "client"])["value"].idxmax()]
            found.append(largest.assign(name=name).rename(columns={"component": "choice"}).drop(columns="value"))
    if "cluster" in _own(clients, lists=False):
        rows = clients.filter(pc.is_valid(clients["cluster"])).select(["method", "server_round", "client", "cluster"])
        found.append(rows.to_pandas().rename(columns={"cluster": "choice"}).assign(name="cluster"))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _server(rounds: pd.DataFrame) -> pd.DataFrame:
    """Return what servers reported, one row per run, method, round and name; values that never change are left out."""
    means = {f"{prefix}{name}" for prefix in PREFIXES for name in MEANS} | {"common_server"}
    known = OF_A_ROUND | means | {"run", "sent", "elapsed"}
    names = [name for name in rounds.columns if name not in known and pd.api.types.is_numeric_dtype(rounds[name])]
    long = rounds.melt(["run", "method", "server_round"], names, var_name="name", value_name="value").dropna()
    return long


def by_seed_mean(frame: pd.DataFrame, keys: Sequence[str], values: Mapping[str, str]) -> pd.DataFrame:
    """Return columns as means over runs, and the least and the largest as NAME_low and NAME_high.

    Args:
        keys: what the rows of a run are told apart by.
        values: names of columns by their names in the result.
    """
    grouped = frame.groupby(list(keys), sort=False, observed=True)
    found: dict[str, pd.Series] = {}
    for name, column in values.items():
        by = grouped[column]
        found |= {name: by.mean(), f"{name}_low": by.min(), f"{name}_high": by.max()}
    return pd.DataFrame(found).reset_index()
