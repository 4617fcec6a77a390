"""What a sweep shows: live progress, and the comparison at its end."""

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from fedray.config.sweep import SCORES
from fedray.evaluation.metrics import configured_metric
from fedray.federation.events import Callback
from fedray.results.report import LiveBars, plain_table, readable_metric
from fedray.sweeps.result import SweepResult, TrialFinished, TrialResult, more_is_better
from fedray.sweeps.space import readable_point, shown

SHOWN_ROWS = 20
"""Points that `sweep_table` lists at most."""


class SweepProgress(LiveBars, Callback):
    """Shows one bar for all trials on a terminal, and everywhere a line for each trial that ends."""

    def __init__(self, console: Console, found: SweepResult):
        columns = TextColumn("[bold]trials"), BarColumn(bar_width=24), MofNCompleteColumn()
        super().__init__(console, *columns, TextColumn("{task.fields[best]}"))
        self._metric = found.sweep.selects_by
        self._higher = more_is_better(found.sweep, found.trials[0].config)
        self._best: float | None = None
        for ended in found.ended.values():
            self._compare(ended)
        self._done, self._all = len(found.trials) - len(found.waiting), len(found.trials)
        self._task = self._bars.add_task("trials", total=self._all, completed=self._done, best="")

    def on_trial_finished(self, event: TrialFinished) -> None:
        """Show the end of a trial."""
        self._done += 1
        self._compare(event.result)
        self._bars.update(self._task, completed=self._done, best="" if self._best is None else f"best {self._best:.4g}")
        self._console.print(self._line(event), highlight=False, soft_wrap=True)

    def _compare(self, ended: TrialResult) -> None:
        value = ended.metrics.get(self._metric) if ended.status == "finished" else None
        if value is not None and (self._best is None or (value > self._best) == self._higher):
            self._best = value

    def _line(self, event: TrialFinished) -> str:
        ended, value = event.result, event.result.metrics.get(self._metric)
        what = f"{self._metric} {value:.4g}" if value is not None else escape(ended.error) or "no metric"
        how = "" if ended.status == "finished" else f" {ended.status} after {ended.rounds} rounds:"
        point = escape(readable_point(event.trial.point))
        return f"{self._done}/{self._all} trial {ended.id}:{how} {what}, {ended.seconds:.1f} s; {point}"


def sweep_table(found: SweepResult) -> Table:
    """Return a table of the points, the best first, with the metric's mean over seeds and its 95 % confidence
    interval."""
    table, metric = found.over_seeds(), found.sweep.metric
    paths = [path for path in found.sweep.space if path not in ("method", "seed")]
    left = f", {len(table) - SHOWN_ROWS} more" if len(table) > SHOWN_ROWS else ""
    ended = [entry.status for entry in found.ended.values()]
    others = "".join(f", {ended.count(kind)} {kind}" for kind in ("stopped", "failed", "lost") if kind in ended)
    title = f"{metric} of {ended.count('finished')} finished trials{others}{left}"
    selecting = ["validation\nmean"] if found.sweep.selects_by != metric else []
    numbers = ("seeds", *selecting, "test mean" if metric in SCORES else "mean", "95 % interval", "first trial")
    shown_table = plain_table(title, ("method", *paths), numbers)

    def readable(value: float) -> str:
        config = found.trials[0].config
        accuracy = metric in SCORES
        return readable_metric(value, configured_metric(config)) if accuracy else f"{value:.4g}"

    for row in table.head(SHOWN_ROWS).to_dict("records"):
        interval = "-" if row["finished"] < 2 else f"{readable(row['low'])} to {readable(row['high'])}"
        values = [shown(row[path]) for path in paths]
        seeds = f"{row['finished']} of {row['seeds']}"
        means = [readable(row["selection"])] * len(selecting) + [readable(row["mean"])]
        shown_table.add_row(str(row["method"]), *values, seeds, *means, interval, row["first_trial"])
    return shown_table
