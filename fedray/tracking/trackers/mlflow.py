"""MLflow. The server's address and its credentials come from the environment (MLFLOW_TRACKING_URI, ..._TOKEN, ...)."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fedray.config import values_by_path
from fedray.config.tracker import EndStatus, TrackedRun, Tracker, TrackerRun
from fedray.config.yaml import to_yaml
from fedray.errors import ConfigError

STATUS: Mapping[EndStatus, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

PER_REQUEST = 100
"""Parameters that MLflow takes at once."""
LONGEST = 500
"""Characters of a parameter's value that are kept; the artifact config.yaml has all of them."""


class MLflow(Tracker):
    name: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "mlflow"
    install: ClassVar[str] = "fedray[mlflow]"

    uri: str | None = None
    """Address of a server, or a store (file:///FOLDER, sqlite:///FILE); default MLFLOW_TRACKING_URI."""
    experiment: str = "fedray"
    """MLflow's experiment, which contains the runs."""

    def check(self, folder: Path | None) -> None:
        super().check(folder)
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ConfigError("mlflow: no server; set `uri`, or MLFLOW_TRACKING_URI")
        if uri.startswith(("sqlite:", "postgresql", "mysql", "mssql")) and find_spec("sqlalchemy") is None:
            raise ConfigError(f"mlflow: a database ({uri.partition(':')[0]}) needs all of MLflow: pip install mlflow")

    def open(self, run: TrackedRun) -> TrackerRun:
        return _Run(self, run)


class _Run(TrackerRun):
    def __init__(self, tracker: MLflow, run: TrackedRun) -> None:
        if (tracker.uri or "").startswith("file:"):  # MLflow asks whether a store of files is meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient(tracking_uri=tracker.uri)
        if run.id:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
        else:
            found = self._client.get_experiment_by_name(tracker.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(tracker.experiment)
            tags = {"fedray.group": run.group} if run.group else {}
            self.id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        known = self._client.get_run(self.id).data.params  # a parameter cannot change; the rounds of a run can
        values = {_name(path): str(value)[:LONGEST] for path, value in values_by_path(run.config).items()}
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(new), PER_REQUEST):
            self._client.log_batch(self.id, params=new[start : start + PER_REQUEST])
        self._client.log_text(self.id, to_yaml(run.config), "config.yaml")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._metric(_name(name), v, now, step) for name, v in metrics.items()])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        self._client.log_table(self.id, columns, f"{name}.json")

    def attach(self, path: Path) -> None:
        self._client.log_artifact(self.id, str(path))

    def finish(self, status: EndStatus) -> None:
        self._client.set_terminated(self.id, STATUS[status])


def _name(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


ENTRY = MLflow
