"""Methods compared: every figure is computed from the clients' scores of the final pass, paired by seed and client."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import get_args

import numpy as np
import pandas as pd

from fedray.config import Metric
from fedray.errors import ComparisonError, choices, nearest
from fedray.randomness import keyed_rng
from fedray.results.client_scores import ClientScores
from fedray.results.comparability import ComparableRuns, MethodRun, comparable_runs, method_runs, named_metric
from fedray.results.ranks import Ranks, ranks_over
from fedray.results.run_result import RunResult
from fedray.results.statistics import (
    FloatArray,
    binomial_error,
    bootstrap_interval,
    bottom_decile,
    confidence_interval,
    holm,
    over_runs,
    paired_t_p,
    run_means,
    sign_flip_p,
)
from fedray.types import Moment

LOCAL = "local"
"""The method whose clients train alone."""
USUAL_REFERENCES = (LOCAL, "fedavg")
FEW_RUNS = 10
"""Seeds below which the bootstrap interval may be clearly too narrow (docs/statistics.md)."""


@dataclass(frozen=True)
class Figures:
    """What the clients of one method score. Everything is the mean over seeds of what it is for one seed.

    Attributes:
        mean: mean over clients.
        sd: standard deviation of the seeds' means; NaN for one seed.
        worst: the client with the worst score.
        bottom_decile: `statistics.bottom_decile`; NaN for fewer than 10 clients.
        test_examples: mean over clients.
        binomial_error: `statistics.binomial_error`; NaN for a metric that is no share of examples.
        hurt_by_training: share of clients that score worse after their last local training than before it; NaN for the
            moment `aggregated`.
        hurt_against_local: share of clients that score worse than the same client of the method `local`; NaN without
            it, and for it.
    """

    method: str
    mean: float
    sd: float
    worst: float
    bottom_decile: float
    test_examples: float
    binomial_error: float
    hurt_by_training: float
    hurt_against_local: float


@dataclass(frozen=True)
class Difference:
    """One method against a reference: differences of the same client with the same seed.

    Attributes:
        delta: mean over seeds of the mean difference over clients, method minus reference.
        low, high: 95 % interval of the two-level bootstrap; with one seed, of drawn clients only.
        t_low, t_high: 95 % interval of Student's t over the seeds' means; NaN for one seed.
        win, tie, loss: shares of clients that are better, equal, worse.
        t_p, sign_flip_p: two-sided p over seeds; NaN for one seed.
        t_p_holm, sign_flip_p_holm: adjusted for the number of methods that are compared with the reference.
    """

    method: str
    reference: str
    delta: float
    low: float
    high: float
    t_low: float
    t_high: float
    win: float
    tie: float
    loss: float
    t_p: float
    sign_flip_p: float
    t_p_holm: float = float("nan")
    sign_flip_p_holm: float = float("nan")


@dataclass(frozen=True)
class DataSetComparison:
    """The methods on one data set.

    Attributes:
        clients: the fewest and the most clients of a seed that have test examples.
        differences: of every method against every reference but itself.
        notes: what to know when reading the figures.
    """

    name: str
    seeds: tuple[int, ...]
    clients: tuple[int, int]
    figures: tuple[Figures, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def against(self, reference: str) -> list[Difference]:
        """Return the differences to one reference."""
        return [one for one in self.differences if one.reference == reference]


@dataclass(frozen=True)
class Comparison:
    """Methods compared on one or several data sets, by the metric on each client's own test examples.

    Attributes:
        references: the methods that the others are compared with.
        ranks: over data sets; None for one data set, or if the data sets share fewer than two methods.
        notes: what concerns all data sets.
    """

    metric: Metric
    moment: Moment
    references: tuple[str, ...]
    data_sets: tuple[DataSetComparison, ...]
    ranks: Ranks | None
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per data set, method and reference; a reference's differences to itself are missing."""
        rows = []
        for data_set in self.data_sets:
            differences = {(one.method, one.reference): asdict(one) for one in data_set.differences}
            for figures in data_set.figures:
                for reference in self.references:
                    found = differences.get((figures.method, reference), {})
                    shape = {"data_set": data_set.name, "seeds": len(data_set.seeds)}
                    rows.append(shape | asdict(figures) | {"reference": reference} | found)
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        from fedray.results.comparison_tables import sheets
        from fedray.results.sheets import markdown

        return markdown(sheets(self))

    def to_latex(self) -> str:
        """Return the tables as LaTeX, which needs the package booktabs; the best value of a column is bold."""
        from fedray.results.comparison_tables import sheets
        from fedray.results.sheets import latex

        return latex(sheets(self))


def compare(
    runs: Sequence[RunResult],
    *,
    references: str | Sequence[str] = (),
    metric: str | None = None,
    moment: Moment | None = None,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare the methods of runs. Runs on one data set are merged by seed; others are compared data set by data set.

    Args:
        references: methods that the others are compared with; default `local` and `fedavg` where every data set has
            them, else the first method.
        metric: label of a metric that all runs have; default their first one.
        moment: default `personalised` where all runs have it (`evaluation.final`), else `aggregated`.
        methods, seeds: compare only these; default all.
        notes: to be shown with the comparison.

    Raises:
        ComparisonError: the runs cannot be compared, or something named is not there; the message says why.
        StateError: a table cannot be read.
    """
    if moment is None:
        moment = "personalised" if all(run.config.evaluation.final == "both" for run in runs) else "aggregated"
    if moment not in (moments := get_args(Moment)):
        raise ComparisonError(f"moment: no {moment!r}{nearest(moment, moments)}; allowed: {choices(moments)}")
    groups = comparable_runs(_chosen([one for run in runs for one in method_runs(run)], methods, seeds), metric)
    metrics = {(found := named_metric(group.config, metric)).label: found for group in groups}
    if len(metrics) > 1:
        raise ComparisonError(f"not comparable: the data sets have different metrics: {choices(metrics)}")
    compared = next(iter(metrics.values()))
    references = (references,) if isinstance(references, str) else tuple(dict.fromkeys(references))
    references = references or _usual_references(groups)
    _check_references(references, groups)
    tables = ClientScores(moment, compared.label)
    data_sets = tuple(_Scores(group, tables, compared).compared(references) for group in groups)
    means = {one.name: {figures.method: figures.mean for figures in one.figures} for one in data_sets}
    ranks = ranks_over(means, compared.higher_is_better, references[0])
    return Comparison(compared, moment, references, data_sets, ranks, (*notes, *_unfinished(runs)))


def _unfinished(runs: Sequence[RunResult]) -> list[str]:
    """Return a note for each run of which some methods have not finished."""
    notes = []
    for run in runs:
        finished = {summary.method for summary in run.summaries}
        if missing := [entry.key for entry in run.config.method if entry.key not in finished]:
            notes.append(f"{run.place}: not finished, and left out: {choices(missing)}")
    return notes


def _chosen(found: Sequence[MethodRun], methods: Sequence[str], seeds: Sequence[int]) -> list[MethodRun]:
    """Return the runs of the given methods and seeds."""
    there = dict.fromkeys(one.method for one in found)
    for name in methods:
        if name not in there:
            raise ComparisonError(f"method: no {name!r}{nearest(name, there)}; the runs have {choices(there)}")
    known = sorted({one.seed for one in found})
    for seed in seeds:
        if seed not in known:
            raise ComparisonError(f"seed: no {seed}; the runs have {choices(known)}")
    chosen = [one for one in found if (not methods or one.method in methods) and (not seeds or one.seed in seeds)]
    if not chosen:
        raise ComparisonError("nothing to compare: no run of these methods and seeds has finished")
    return chosen


def _usual_references(groups: Sequence[ComparableRuns]) -> tuple[str, ...]:
    common = [name for name in groups[0].by_method if all(name in group.by_method for group in groups)]
    if not common:
        listed = "; ".join(f"{group.name} has {choices(group.by_method)}" for group in groups)
        raise ComparisonError(f"not comparable: no method is on all data sets: {listed}")
    return tuple(name for name in USUAL_REFERENCES if name in common) or (common[0],)


def _check_references(references: Sequence[str], groups: Sequence[ComparableRuns]) -> None:
    for name in references:
        for group in groups:
            if name not in (there := group.by_method):
                raise ComparisonError(
                    f"reference: no method {name!r}{nearest(name, there)}; {group.name} has {choices(there)}"
                )


class _Scores:
    """The clients' scores on one data set.

    Args:
        runs: what is compared.
    """

    def __init__(self, runs: ComparableRuns, tables: ClientScores, metric: Metric):
        self._runs, self._metric, self._moment = runs, metric, tables.moment
        self._frames = {
            method: {seed: tables.of(one) for seed, one in by_seed.items()}
            for method, by_seed in runs.by_method.items()
        }

    def compared(self, references: Sequence[str]) -> DataSetComparison:
        """Return every figure."""
        figures = tuple(self._figures(method) for method in self._frames)
        differences: list[Difference] = []
        for reference in references:
            found = [self._difference(method, reference) for method in self._frames if method != reference]
            t, flips = holm([one.t_p for one in found]), holm([one.sign_flip_p for one in found])
            differences += [
                replace(one, t_p_holm=float(a), sign_flip_p_holm=float(b))
                for one, a, b in zip(found, t, flips, strict=True)
            ]
        counts = [len(clients) for clients in self._testable.values()]
        shape = (min(counts), max(counts))
        return DataSetComparison(self._runs.name, self._runs.seeds, shape, figures, tuple(differences), self._notes())

    @cached_property
    def _testable(self) -> dict[int, pd.Index]:
        """By seed the clients that have test examples in any method."""
        found: dict[int, pd.Index] = {}
        for frames in self._frames.values():
            for seed, frame in frames.items():
                clients = frame.index[frame["examples"] > 0]
                found[seed] = found[seed].union(clients) if seed in found else clients
        return found

    def _defined(self, method: str) -> list[pd.DataFrame]:
        """Return a method's clients that have a score, seed by seed."""
        found = self._frames[method].values()
        return [frame[(frame["examples"] > 0) & frame["score"].notna()] for frame in found]

    def _figures(self, method: str) -> Figures:
        defined = self._defined(method)
        scores = [frame["score"].to_numpy() for frame in defined]
        higher = self._metric.higher_is_better
        means = run_means(scores)
        proportions = defined if self._metric.proportion else []
        errors = [binomial_error(frame["score"].to_numpy(), frame["examples"].to_numpy()) for frame in proportions]
        before = [_differences(frame, frame, "score", "aggregated") for frame in defined]
        local = self._paired(method, LOCAL) if LOCAL in self._frames and method != LOCAL else []
        return Figures(
            method=method,
            mean=over_runs(scores),
            sd=float(means.std(ddof=1)) if len(means) > 1 else float("nan"),
            worst=float(np.mean([values.min() if higher else values.max() for values in scores])),
            bottom_decile=float(np.mean([bottom_decile(values, higher) for values in scores])),
            test_examples=over_runs([frame["examples"].to_numpy() for frame in defined]),
            binomial_error=float(np.mean(errors)) if errors else float("nan"),
            hurt_by_training=self._share_worse(before) if self._moment == "personalised" else float("nan"),
            hurt_against_local=self._share_worse(local),
        )

    def _share_worse(self, differences: Sequence[FloatArray]) -> float:
        return over_runs([self._gain(values) < 0 for values in differences if len(values)])

    def _gain(self, differences: FloatArray) -> FloatArray:
        """Return differences that are positive where the first is better."""
        return differences if self._metric.higher_is_better else -differences

    def _paired(self, method: str, reference: str) -> list[FloatArray]:
        """Return by seed the differences of the clients that have both scores."""
        pairs = zip(self._defined(method), self._defined(reference), strict=True)
        return [values for a, b in pairs if len(values := _differences(a, b, "score", "score"))]

    def _difference(self, method: str, reference: str) -> Difference:
        pairs = self._paired(method, reference)
        if not pairs:
            raise ComparisonError(
                f"not comparable: on {self._runs.name}, no client has a score of both {method} and {reference}"
            )
        gains = [self._gain(values) for values in pairs]
        means = run_means(pairs)
        low, high = bootstrap_interval(pairs, keyed_rng(0, "bootstrap"))
        t_low, t_high = confidence_interval(means)
        return Difference(
            method=method,
            reference=reference,
            delta=over_runs(pairs),
            low=low,
            high=high,
            t_low=t_low,
            t_high=t_high,
            win=over_runs([values > 0 for values in gains]),
            tie=over_runs([values == 0 for values in gains]),
            loss=over_runs([values < 0 for values in gains]),
            t_p=paired_t_p(means),
            sign_flip_p=sign_flip_p(means),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = [seeds_note(len(self._runs.seeds))]
        untested = {
            client
            for frames in self._frames.values()
            for seed, frame in frames.items()
            for client in frame.index.difference(self._testable[seed])
        }
        if untested:
            notes.append(f"without test examples, and left out: {choices(sorted(untested), 5)}")
        for method, frames in self._frames.items():
            testable = {seed: frame.reindex(self._testable[seed]) for seed, frame in frames.items()}
            undefined = {seed: frame.index[frame["score"].isna()] for seed, frame in testable.items()}
            if count := sum(map(len, undefined.values())):
                where = [f"{client} (seed {seed})" for seed, clients in undefined.items() for client in clients]
                of = sum(map(len, testable.values()))
                notes.append(
                    f"{method}: {count} of {of} scores are undefined or missing, and left out of its figures and "
                    f"differences: {choices(where, 3)}"
                )
        return tuple(notes)


def seeds_note(seeds: int) -> str:
    """Return what the number of seeds means for intervals and tests."""
    if seeds == 1:
        return (
            "one seed: intervals are over clients only and say nothing about other seeds; tests over seeds need at "
            "least two"
        )
    smallest = 2.0 ** (1 - seeds)
    note = f"{seeds} seeds: the smallest p of the sign-flip test is {smallest:.2g}"
    if seeds < FEW_RUNS:
        note += "; the bootstrap interval is too narrow if seeds differ more than clients do, the t interval is not"
    return note


def _differences(a: pd.DataFrame, b: pd.DataFrame, first: str, second: str) -> FloatArray:
    """Return `first` of a minus `second` of b for the clients that have both."""
    found: FloatArray = (a[first] - b[second].reindex(a.index)).dropna().to_numpy()
    return found
