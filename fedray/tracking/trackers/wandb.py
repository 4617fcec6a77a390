"""Weights & Biases. Credentials come from the environment (WANDB_API_KEY) or from `wandb login`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedray.config.tracker import FOLDER, EndStatus, TrackedRun, Tracker, TrackerRun
from fedray.errors import ConfigError

PATIENCE_S = 60.0
"""Seconds that the end of a run waits for what has not been uploaded yet; the files stay, for `wandb sync`."""

STEP = "round"
"""The metric that is the axis of all others: wandb's own steps only grow, and rounds begin again with each method."""


class WeightsAndBiases(Tracker):
    name: ClassVar[str] = "wandb"
    package: ClassVar[str] = "wandb"
    install: ClassVar[str] = "fedray[wandb]"

    project: str = "fedray"
    """Project of the runs."""
    entity: str | None = None
    """User or team; default the one of the credentials."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline: write files, which `wandb sync` uploads later. Default: WANDB_MODE, or else online."""
    tags: tuple[str, ...] = ()
    """Tags of the runs."""

    def check(self, folder: Path | None) -> None:
        super().check(folder)
        if (self.mode or os.environ.get("WANDB_MODE", "online")) == "online":
            import wandb

            if not wandb.login(prompt=False, verify=False):  # `wandb.init` would ask on the terminal
                raise ConfigError("wandb: no credentials; set WANDB_API_KEY, run `wandb login`, or use mode: offline")

    def open(self, run: TrackedRun) -> TrackerRun:
        return _Run(self, run)


class _Run(TrackerRun):
    def __init__(self, tracker: WeightsAndBiases, run: TrackedRun) -> None:
        import wandb

        folder = run.folder / FOLDER if run.folder else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            entity=tracker.entity,
            project=tracker.project,
            group=run.group or None,
            name=run.name,
            tags=tracker.tags,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            allow_val_change=True,  # a continued run may have more rounds
            dir=folder,
            mode=tracker.mode,
            reinit="create_new",  # the trials of a sweep are open at the same time
            settings=wandb.Settings(
                console="off", silent=True, finish_timeout=PATIENCE_S, finish_timeout_raises=True, disable_git=True
            ),
        )
        self.id, self._logged = self._run.id, run.logged
        self._run.define_metric("*", step_metric=STEP)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._logged += 1
        self._run.log({STEP: step, **metrics}, step=self._logged)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self._wandb.Table(columns=[*rows[0]], data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=self._logged)

    def attach(self, path: Path) -> None:
        if path.suffix == ".html":
            page = self._wandb.Html(path.read_text("utf-8"), inject=False)
            self._run.log({path.stem: page}, step=self._logged)

    def finish(self, status: EndStatus) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


ENTRY = WeightsAndBiases
