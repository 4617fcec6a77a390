"""What the command line shows of runs, jobs and costs: live progress, and tables."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedray.config import Metric
from fedray.errors import choices
from fedray.federation.events import Callback, MethodFinished, MethodStarted, RoundFinished, TaskFailed, TasksFinished
from fedray.federation.summary import Summary
from fedray.types import ROLES, Client, round_number

if TYPE_CHECKING:  # these import torch, which tables do not need
    from fedray.data.shards import FederatedData
    from fedray.planning.accounting import Cost
    from fedray.results.comparison import Comparison

NONE = "-"
"""What tables show where there is no figure."""
UNITS = ("B", "kB", "MB", "GB", "TB")
COUNT_UNITS = ((1_000, "k"), (1_000_000, "M"), (1_000_000_000, "G"))


def readable_bytes(count: float) -> str:
    """Return 1234567 as `1.2 MB` (powers of 1000)."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def readable_count(count: int) -> str:
    """Return 12345678 as `12.3 M`, and counts below 100,000 in full."""
    if count < 100_000:
        return f"{count:,}"
    size, unit = next(entry for entry in COUNT_UNITS if count < 1000 * entry[0] or entry == COUNT_UNITS[-1])
    return f"{count / size:.1f} {unit}"


def readable_metric(value: float | None, metric: Metric) -> str:
    """Return a value of the metric as tables show it; `-` if it was not measured."""
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" if metric.percent else f"{value:.3f}"


class MetricFormat:
    """Writes scores of a metric, and differences of them, without their unit; `-` for NaN."""

    def __init__(self, metric: Metric):
        self._scale, self._digits = (100, 1) if metric.percent else (1, 3)

    def score(self, value: float) -> str:
        """Return a score."""
        return NONE if math.isnan(value) else f"{self._scale * value:.{self._digits}f}"

    def difference(self, value: float) -> str:
        """Return a difference, with its sign."""
        return NONE if math.isnan(value) else f"{self._scale * value:+.{self._digits}f}"

    def interval(self, low: float, high: float) -> str:
        """Return the ends of an interval of differences."""
        return NONE if math.isnan(low) else f"[{self.difference(low)}, {self.difference(high)}]"


PLAIN_EVERY_S = 2.0
"""Seconds between lines about rounds if there is no terminal."""


class LiveBars:
    """Bars with elapsed and remaining time: a context manager that shows them on a terminal, and nothing elsewhere."""

    def __init__(self, console: Console, *columns: ProgressColumn):
        self._console = console
        self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bars.stop()


class LiveProgress(LiveBars, Callback):
    """Shows a bar per method on a terminal. Elsewhere (job logs, pipes) it prints a plain line per round, at most one
    every two seconds, with the bytes sent and when the method should end."""

    def __init__(self, console: Console, metric: Metric):
        super().__init__(
            console,
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[at]:<12}"),
            TextColumn("{task.fields[scores]}"),
        )
        self._metric = metric
        self._tasks: dict[str, TaskID] = {}
        self._sent = 0
        self._printed = 0.0

    def on_method_started(self, event: MethodStarted) -> None:
        if event.method in self._tasks:  # the driver died, and the method starts again
            self._bars.remove_task(self._tasks[event.method])
        self._sent, self._printed = 0, 0.0
        self._tasks[event.method] = self._bars.add_task(
            event.method, total=event.tasks, completed=event.tasks_done, at="starting", scores=""
        )
        continued = f", continued after {event.server_round}" if event.server_round else ""
        self._plain(f"{event.method}: {event.rounds} rounds{continued}")

    def on_tasks_finished(self, event: TasksFinished) -> None:
        self._bars.advance(self._tasks[event.method], len(event.clients))

    def on_task_failed(self, event: TaskFailed) -> None:
        self._console.print(failure_line(event), style="yellow", highlight=False, markup=False, soft_wrap=True)

    def on_round_finished(self, event: RoundFinished) -> None:
        at = "final pass" if event.final else f"round {round_number(event.server_round)}"
        parts = [] if event.train_loss is None else [f"loss {event.train_loss:.3f}"]
        if event.aggregated is not None:
            parts.append(f"aggregated {readable_metric(event.aggregated, self._metric)}")
        if event.personalised is not None:
            parts.append(f"personalised {readable_metric(event.personalised, self._metric)}")
        self._sent += event.uplink_bytes + event.downlink_bytes
        parts = parts or ["nothing trained or measured"]
        scores = ", ".join([*parts, f"{readable_bytes(self._sent)} sent"])
        self._bars.update(self._tasks[event.method], at=at, scores=scores)
        if event.final or monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = monotonic()
            self._plain(f"{event.method}: {at}: {scores}, {event.seconds:.1f} s{self._end_of(event.method)}")

    def on_method_finished(self, event: MethodFinished) -> None:
        if (task := self._tasks.get(event.summary.method)) is None:
            self._plain(f"{event.summary.method}: finished before")
            return
        total = self._bars.tasks[self._bars.task_ids.index(task)].total  # clients that were left out never finished
        self._bars.update(task, completed=total, at="done")

    def _end_of(self, method: str) -> str:
        """Return when a method should end, estimated from its clients so far."""
        left = self._bars.tasks[self._bars.task_ids.index(self._tasks[method])].time_remaining
        return f", ends in about {timedelta(seconds=round(left))}" if left else ""

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)


def failure_line(event: TaskFailed) -> str:
    """Return a line that says what went wrong and what was done about it."""
    attempt = event.attempt
    where = f" on {attempt.node}" if attempt.node else ""
    at = f"{event.method}: round {round_number(attempt.server_round)}: {choices(attempt.clients, 5)}"
    return f"{at}: {attempt.kind}{where}: {attempt.cause}; {attempt.action}"


def summary_table(summaries: Sequence[Summary], metric: Metric, comparison: "Comparison | None" = None) -> Table:
    """Return a table of a run's methods by the measured metric, one row per method. Bytes are sent up and down.

    Args:
        comparison: of the same methods; adds the differences to its first reference, with 95 % intervals over clients.
    """
    unit, written = (" in %" if metric.percent else ""), MetricFormat(metric)
    reference = comparison.references[0] if comparison else ""
    differences = {one.method: one for one in comparison.data_sets[0].against(reference)} if comparison else {}
    columns = [f"Δ to {reference}\n95 % over clients"] if comparison else []
    trained = any(entry.personalised_mean is not None for entry in summaries)
    table = plain_table(
        f"{metric.label}{unit} on each client's own test examples, after {summaries[0].rounds} rounds",
        ("method", "head"),
        (
            *(("person-\nalised", *columns, "worst\nclient") if trained else ()),
            "aggre-\ngated",
            *(() if trained else columns),
            *("trainable", "sent", "time"),
        ),
    )
    for entry in summaries:
        found = differences.get(entry.method)
        delta = f"{written.difference(found.delta)} {written.interval(found.low, found.high)}" if found else NONE
        table.add_row(
            entry.method,
            entry.head,
            written.score(_number(entry.personalised_mean)),
            *([delta] if comparison else []),
            written.score(_number(entry.personalised_worst)),
            written.score(_number(entry.aggregated_mean)),
            readable_count(entry.trainable_parameters),
            readable_bytes(entry.uplink_bytes + entry.downlink_bytes),
            f"{entry.wall_seconds:.0f} s",
        )
    return table


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def jobs_table(jobs: Sequence[Any]) -> Table:
    """Return a table of submitted jobs.

    Args:
        jobs: `JobDetails` of Ray's Jobs API.
    """
    table = plain_table(f"{len(jobs)} jobs", ("job", "status", "started", "command"), ("took",))
    table.columns[3].no_wrap = False
    for job in jobs:
        started = datetime.fromtimestamp(job.start_time / 1000) if job.start_time else None
        took = (job.end_time - job.start_time) / 1000 if job.end_time and job.start_time else None
        table.add_row(
            job.submission_id,
            job.status.value.lower(),
            "-" if started is None else started.strftime("%Y-%m-%d %H:%M:%S"),
            job.entrypoint.partition(" --output ")[0].removeprefix("python -m "),
            "-" if took is None else f"{took:.0f} s",
        )
    return table


def cost_table(costs: "Mapping[str, Mapping[str, Cost]]") -> Table:
    """Return a table of what each method trains and sends per client and round. Tiers that do not differ share one row.

    If a method of the comparison trains the whole model, the last column says how many times more numbers it sends up.
    """
    numbers = ("trainable", "of all", "total", "numbers up", "numbers down", "bytes up", "bytes down")
    full = next((by_tier for by_tier in costs.values() if all(trains_all(c) for c in by_tier.values())), None)
    table = plain_table(
        "per client and round", ("method", "tier", "head"), (*numbers, *(["full /\nup"] if full else []))
    )
    for method, by_tier in costs.items():
        rows = by_tier if len(set(by_tier.values())) > 1 else {"all": next(iter(by_tier.values()))}
        for tier, cost in rows.items():
            whole = next(iter(full.values())).uplink if full else 0
            table.add_row(
                method,
                tier,
                cost.head,
                f"{cost.trainable:,}",
                f"{100 * cost.trainable / cost.total:.4f} %",
                f"{cost.total:,}",
                f"{cost.uplink:,}",
                f"{cost.downlink:,}",
                f"{cost.uplink_bytes:,}",
                f"{cost.downlink_bytes:,}",
                *([times(whole, cost.uplink)] if full else []),
            )
    return table


def trains_all(cost: "Cost") -> bool:
    """Return whether a cost is that of full fine-tuning, with which ratios compare."""
    return cost.trainable == cost.total


def times(whole: float | None, part: float | None) -> str:
    """Return the ratio of `whole` to `part`; `-` if there is nothing to compare."""
    return f"{whole / part:.1f}" if whole and part else "-"


def data_table(clients: Sequence[Client], data: "FederatedData") -> Table:
    """Return a table of each client's tier and examples, with the size of the common test set if there is one."""
    classes = f", {len(data.label_names)} classes" if data.label_names else ""
    table = plain_table(f"{len(clients)} clients{classes}", ("client", "tier"), ("train", "validation", "test"))
    for client in clients:
        shard = data.shards[client.id]
        counts = [f"{shard.num_examples(split):,}" for split in ("train", "validation", "test")]
        table.add_row(escape(" ".join(client.id.split())), client.tier, *counts)
    if data.common is not None:
        table.add_section()
        table.add_row("common test set", "", "", "", f"{data.common.num_rows:,}")
    return table


def parts_table(data: "FederatedData") -> Table:
    """Return a table of the examples of every part of the data."""
    table = plain_table(f"{len(data.parts)} parts", ("part",), ROLES)
    for name, counts in data.parts.items():
        table.add_row(escape(name), *(f"{counts[role]:,}" for role in ROLES))
    return table


def plain_table(title: str | None, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return an empty table, narrow enough for a laptop.

    Args:
        words: names of the left-aligned columns.
        numbers: names of the right-aligned columns.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
