"""TensorBoard: event files in the run's folder, which `tensorboard --logdir FOLDER` shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fedray.config.tracker import FOLDER, EndStatus, TrackedRun, Tracker, TrackerRun
from fedray.config.yaml import to_yaml
from fedray.errors import ConfigError


class TensorBoard(Tracker):
    name: ClassVar[str] = "tensorboard"
    package: ClassVar[str] = "tensorboardX"

    folder: str | None = None
    """Folder that gets a folder of event files per run; default `trackers/tensorboard` in each run's own folder."""

    def check(self, folder: Path | None) -> None:
        super().check(folder)
        if folder is None and self.folder is None:
            raise ConfigError("tensorboard: the run's folder is not on this machine; set `folder` to one that is")

    def open(self, run: TrackedRun) -> TrackerRun:
        if self.folder is None and run.folder is not None:
            return _Run(run, run.folder / FOLDER / "tensorboard", "")
        place = Path(run.id) if run.id else (Path(self.folder or "") / run.name).absolute()
        return _Run(run, place, str(place))


class _Run(TrackerRun):
    def __init__(self, run: TrackedRun, place: Path, id: str) -> None:
        from tensorboardX import SummaryWriter

        place.mkdir(parents=True, exist_ok=True)
        self.id, self._writer = id, SummaryWriter(str(place))
        if run.id is None:
            indented = "\n".join(f"    {line}" for line in to_yaml(run.config).splitlines())
            self._writer.add_text("configuration", indented)  # Markdown's code
            self._writer.flush()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a process that is killed loses nothing

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        cells = (" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines)
        self._writer.add_text(name, "\n".join(f"| {line} |" for line in cells))

    def finish(self, status: EndStatus) -> None:
        self._writer.close()


ENTRY = TensorBoard
