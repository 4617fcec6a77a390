"""What a tracker has been told of one run, and what it has not.

A run is logged from its folder: rounds.parquet says which rounds there are, and RUN/trackers/NAME.json how far they are
logged and how the tracker itself calls the run. So rounds that no event announced (the driver died, the tracker is new)
are logged, too, and none is logged twice.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from fedray.config.tracker import FOLDER, EndStatus, TrackedRun, Tracker, TrackerRun
from fedray.report.files import NAME as REPORT
from fedray.results.run_result import RunResult, read_summaries
from fedray.storage.paths import StoragePath
from fedray.storage.tables import read_table
from fedray.tracking.metrics import round_metrics, totals

Tables = Mapping[str, Sequence[Mapping[Any, Any]]]


@dataclass
class Progress:
    """How far a run is logged.

    Attributes:
        id: of the run in the tracker; None before it has one.
        rounds: finished rounds that are logged, by method.
        final: number of rounds after which the final pass is logged, by method.
        totals: of the logged rounds, by method (`metrics.totals`).
        logged: how many rounds and final passes are logged.
    """

    id: str | None = None
    rounds: dict[str, int] = field(default_factory=dict)
    final: dict[str, int] = field(default_factory=dict)
    totals: dict[str, dict[str, float]] = field(default_factory=dict)
    logged: int = 0

    def rest_of(self, table: pa.Table) -> list[dict[str, Any]]:
        """Return the rows of rounds.parquet that are not logged, in order."""
        keys = table.select(["method", "phase", "server_round"]).to_pandas()
        final = keys["phase"] == "final"
        rounds = keys["method"].map(self.rounds).fillna(0)
        last = keys["method"].map(self.final).fillna(0)
        new = np.where(final, keys["server_round"] > last, keys["server_round"] >= rounds)
        rows: list[dict[str, Any]] = table.filter(pa.array(new)).to_pylist()
        return rows

    def add(self, row: Mapping[str, Any], totals: dict[str, float]) -> None:
        """Count a row as logged."""
        method = row["method"]
        if row["phase"] == "final":
            self.final[method] = row["server_round"]
        else:
            self.rounds[method] = row["server_round"] + 1
        self.totals[method] = totals
        self.logged += 1


class Followed:
    """A run, a trial or a sweep that a tracker follows.

    Args:
        key: name of the tracker within the run.
        metric: label of the run's metric; empty for a sweep, which has no rounds of its own.

    Attributes:
        at: method and round that are being logged.
    """

    def __init__(self, tracker: Tracker, key: str, place: StoragePath, run: TrackedRun, metric: str = ""):
        self.place, self.at = place, ("", 0)
        self._tracker, self._file, self._run, self._metric = tracker, place / FOLDER / f"{key}.json", run, metric
        self._progress = Progress()
        self._open: TrackerRun | None = None

    def catch_up(self) -> None:
        """Log the rounds that are not logged yet."""
        tracked = self._opened()
        table = read_table(self.place, "rounds") if self._metric else None
        if table is None or not table.num_columns:
            return
        for row in self._progress.rest_of(table):
            method = row["method"]
            self.at = method, row["server_round"]
            so_far = totals(row, self._progress.totals.get(method, {}))
            tracked.log(*round_metrics({**row, **so_far}, self._metric))
            self._progress.add(row, so_far)
            self._save()

    def end(self, status: EndStatus, tables: Tables | None = None) -> None:
        """Log what is missing, the final tables and the report, and close the run.

        Args:
            tables: the final tables; None for those of a run that has finished methods.
        """
        try:
            self.catch_up()
            tracked = self._opened()
            for name, rows in (self._tables() if tables is None else tables).items():
                if rows:
                    tracked.table(name, [{key: _defined(value) for key, value in row.items()} for row in rows])
            if (self.place / REPORT).is_file():  # attached to a run that has one when it ends
                with _on_this_machine(self.place / REPORT) as path:
                    tracked.attach(path)
        finally:
            if self._open is not None:
                tracked, self._open = self._open, None
                tracked.finish(status)

    def _opened(self) -> TrackerRun:
        if self._open is None:
            if self._file.is_file():
                self._progress = Progress(**json.loads(self._file.read()))
            run = replace(self._run, id=self._progress.id, logged=self._progress.logged)
            self._open = self._tracker.open(run)
            self._progress.id = self._open.id
            self._save()
        return self._open

    def _tables(self) -> Tables:
        if not read_summaries(self.place):
            return {}
        result = RunResult.load(self.place)
        return {"summary": result.to_pandas().to_dict("records"), "scores": result.scores().to_dict("records")}

    def _save(self) -> None:
        self._file.write(json.dumps(asdict(self._progress)).encode(), durable=False)


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _on_this_machine(file: StoragePath) -> Iterator[Path]:
    """Yield the path of a file, or of a copy of it if it is elsewhere."""
    if file.filesystem is None:
        yield file.local
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        path.write_bytes(file.read())
        yield path
