"""A comparison as tables."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedray.errors import choices
from fedray.results.comparison import Comparison, DataSetComparison, Difference, Figures
from fedray.results.ranks import Ranks
from fedray.results.report import NONE, MetricFormat
from fedray.results.sheets import Cell, Sheet


def sheets(comparison: Comparison) -> list[Sheet]:
    """Return the tables of a comparison: for each data set the methods' scores and the differences to each reference,
    and the ranks over data sets."""
    found = []
    for data_set in comparison.data_sets:
        found.append(_score_sheet(comparison, data_set))
        found += [_difference_sheet(comparison, data_set, reference) for reference in comparison.references]
        found[-1] = replace(found[-1], notes=data_set.notes)
    if comparison.ranks is not None:
        found.append(_rank_sheet(comparison.ranks))
    found[-1] = replace(found[-1], notes=(*found[-1].notes, *comparison.notes))
    return found


def csv(comparison: Comparison) -> str:
    """Return `Comparison.to_pandas` as CSV."""
    return str(comparison.to_pandas().to_csv(index=False))


def share(value: float) -> str:
    """Return a share in percent, without its unit."""
    return NONE if math.isnan(value) else f"{100 * value:.0f}"


def p_value(value: float) -> str:
    """Return a p value."""
    return NONE if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _score_sheet(comparison: Comparison, data_set: DataSetComparison) -> Sheet:
    metric, formatter = comparison.metric, MetricFormat(comparison.metric)
    columns: dict[str, tuple[Callable[[float], str], Callable[[Figures], float], bool | None]] = {
        "mean": (formatter.score, lambda one: one.mean, metric.higher_is_better),
        "± of\nseeds": (formatter.score, lambda one: one.sd, None),
        "worst\nclient": (formatter.score, lambda one: one.worst, metric.higher_is_better),
        "bottom\ndecile": (formatter.score, lambda one: one.bottom_decile, metric.higher_is_better),
        "± of a\nclient": (formatter.score, lambda one: one.binomial_error, None),
        "hurt by\ntraining": (share, lambda one: one.hurt_by_training, False),
        "hurt\nvs local": (share, lambda one: one.hurt_against_local, None),
    }
    shown = {name: column for name, column in columns.items() if _any_defined(data_set.figures, column[1])}
    rows = []
    for figures in data_set.figures:
        cells = [
            Cell(write(get(figures)), higher is not None and _is_best(get, figures, data_set.figures, higher))
            for write, get, higher in shown.values()
        ]
        rows.append((Cell(figures.method), *cells))
    return Sheet(_title(comparison, data_set), ("method", *shown), tuple(rows))


def _title(comparison: Comparison, data_set: DataSetComparison) -> str:
    metric = comparison.metric
    unit = " in %" if metric.percent else ""
    better = "" if metric.higher_is_better else ", lower is better"
    fewest, most = data_set.clients
    clients = f"{most} clients" if fewest == most else f"{fewest} to {most} clients"
    seeds = f"{len(data_set.seeds)} seed{'s' * (len(data_set.seeds) > 1)} ({choices(data_set.seeds, 10)})"
    examples = sum(one.test_examples for one in data_set.figures) / len(data_set.figures)
    return (
        f"{data_set.name}: {metric.label}{unit}{better}, {comparison.moment}; {seeds}, {clients} with "
        f"{examples:.0f} test examples on average"
    )


def _difference_sheet(comparison: Comparison, data_set: DataSetComparison, reference: str) -> Sheet:
    formatter = MetricFormat(comparison.metric)
    one_seed = len(data_set.seeds) == 1
    bootstrap = "95 %,\nclients only" if one_seed else "95 %,\nbootstrap"
    columns: dict[str, Callable[[Difference], str]] = {
        f"Δ to\n{reference}": lambda one: formatter.difference(one.delta),
        bootstrap: lambda one: formatter.interval(one.low, one.high),
    }
    if not one_seed:
        columns["95 %,\nt over seeds"] = lambda one: formatter.interval(one.t_low, one.t_high)
    columns["win/tie/loss\n% of clients"] = lambda one: f"{share(one.win)}/{share(one.tie)}/{share(one.loss)}"
    if not one_seed:
        columns["p, t\n(Holm)"] = lambda one: p_value(one.t_p_holm)
        columns["p, sign flip\n(Holm)"] = lambda one: p_value(one.sign_flip_p_holm)
    found = data_set.against(reference)
    higher = comparison.metric.higher_is_better
    best = max(found, key=lambda one: one.delta if higher else -one.delta).delta
    rows = []
    for one in found:
        delta, *others = (write(one) for write in columns.values())
        rows.append((Cell(one.method), Cell(delta, one.delta == best), *map(Cell, others)))
    return Sheet(
        f"{data_set.name}: differences to {reference}, client by client, on the same seeds",
        ("method", *columns),
        tuple(rows),
    )


def _rank_sheet(ranks: Ranks) -> Sheet:
    letters = [chr(ord("a") + i) for i in range(len(ranks.groups))]
    columns = ["mean rank"]
    notes = []
    tested = not math.isnan(ranks.critical_difference)
    if tested:
        columns += ["not\ndistinguished", f"p against {ranks.reference}\n(Wilcoxon, Holm)"]
        notes.append(
            f"critical difference of mean ranks at 5 % (Nemenyi): {ranks.critical_difference:.2f}; methods that share "
            "a letter are not distinguished"
        )
        if not math.isnan(ranks.friedman_p):
            notes.append(f"Friedman's test that all methods rank alike: p = {p_value(ranks.friedman_p)}")
    else:
        notes.append(f"{len(ranks.data_sets)} data sets: ranks are tested from six on")
    rows = []
    for method, rank in zip(ranks.methods, ranks.mean_ranks, strict=True):
        cells = [Cell(f"{rank:.2f}", rank == ranks.mean_ranks[0])]
        if tested:
            own = [letter for letter, group in zip(letters, ranks.groups, strict=True) if method in group]
            cells += [Cell("".join(own) or NONE), Cell(p_value(ranks.wilcoxon_p_holm.get(method, math.nan)))]
        rows.append((Cell(method), *cells))
    title = f"mean ranks over {len(ranks.data_sets)} data sets ({', '.join(ranks.data_sets)}); 1 is the best"
    return Sheet(title, ("method", *columns), tuple(rows), tuple(notes))


def _any_defined(figures: Sequence[Figures], get: Callable[[Figures], float]) -> bool:
    return any(not math.isnan(get(one)) for one in figures)


def _is_best(get: Callable[[Figures], float], one: Figures, figures: Sequence[Figures], higher_is_better: bool) -> bool:
    values = [value for entry in figures if not math.isnan(value := get(entry))]
    return bool(values) and get(one) == (max if higher_is_better else min)(values)
