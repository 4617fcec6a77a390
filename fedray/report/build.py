"""From runs to a report: which figures, tables and sentences it has, in which order."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import PurePath

import pandas as pd

from fedray.config import Config, dump_yaml
from fedray.errors import FedrayError, StateError, choices
from fedray.report.costs import memory_card, missed_card, time_card, traffic_card
from fedray.report.curves import curve_cards
from fedray.report.document import Report, Section, Text
from fedray.report.figure import Card, Figure, Listing
from fedray.report.headline import headline_sheet
from fedray.report.partition import partition_cards
from fedray.report.recorded import recorded_cards
from fedray.report.scores import clients_card, cost_card, difference_card, final_means, worst_listing
from fedray.report.style import method_styles
from fedray.report.tables import RunTables, read_runs
from fedray.results.comparability import data_key
from fedray.results.comparison import USUAL_REFERENCES, Comparison, DataSetComparison, compare
from fedray.results.comparison_tables import sheets
from fedray.results.run_result import RunResult
from fedray.results.versions import versions_of
from fedray.storage.paths import StoragePath
from fedray.types import round_number

EVENTS = 100
"""Entries of the event log that are listed; all are in events.parquet."""


def report_of(
    runs: Sequence[RunResult],
    title: str = "",
    notes: Sequence[str] = (),
    more: Sequence[Section] = (),
    texts: Sequence[Text] = (),
) -> Report:
    """Return the report of at least one run.

    Args:
        title: default the name of the first run's experiment.
        notes: to be shown with the headline.
        more: sections to be shown after the headline.
        texts: configuration and commands, if they are not those of a single run.

    Raises:
        StateError: a table is missing or cannot be read.
    """
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(data_key(run.config), []).append(run)
    methods = {one.method for run in runs for one in run.summaries}
    comparison, why_not = _compared(runs, notes)
    sections: list[Section] = []
    for number, members in enumerate(groups.values()):
        data_set = _of_group(comparison, number)
        found = _sections(read_runs(members), comparison, data_set)
        if len(groups) > 1:
            name = data_set.name if data_set else f"data set {number + 1}"
            found = [_renamed(section, name, number) for section in found]
        if not number:
            said = [why_not] if why_not and len(methods) > 1 else []
            found[0] = replace(found[0], notes=(*notes, *said, *found[0].notes))
            found[1:1] = more
        sections += found
    config = runs[0].config
    about = facts(config, runs[0].summaries[0].clients, methods, {run.config.seed for run in runs})
    repeat = (
        *(texts or repeating(runs[0].place, "run", "config.yaml", dump_yaml(config))),
        _versions(runs[0]),
    )
    sections.append(Section("repeat", "Configuration, versions, commands", texts=repeat))
    return Report(title or config.name, about, tuple(sections))


def _compared(runs: Sequence[RunResult], notes: Sequence[str]) -> tuple[Comparison | None, str]:
    """Return the methods compared, or None and why they cannot be."""
    try:
        return compare(runs, notes=notes), ""
    except StateError:
        raise
    except FedrayError as error:
        return None, str(error)


def _of_group(comparison: Comparison | None, number: int) -> DataSetComparison | None:
    return comparison.data_sets[number] if comparison and number < len(comparison.data_sets) else None


def _renamed(section: Section, name: str, number: int) -> Section:
    """Return a section as that of one of several data sets."""

    def renamed(figure: Figure) -> Figure:
        return replace(figure, key=f"{figure.key}-{number + 1}", title=f"{figure.title}: {name}")

    cards = tuple(
        Card(card.title, {view: renamed(figure) for view, figure in card.views.items()}) for card in section.cards
    )
    return replace(section, key=f"{section.key}-{number + 1}", title=f"{section.title}: {name}", cards=cards)


def _sections(tables: RunTables, comparison: Comparison | None, data_set: DataSetComparison | None) -> list[Section]:
    """Return the sections of the runs on one data set."""
    best_first = list(final_means(tables).index)
    references = comparison.references if comparison else USUAL_REFERENCES
    styles = method_styles(tables.methods, best_first, references)
    return [
        _headline(tables, comparison, data_set, styles),
        _curves(tables, styles),
        _data(tables),
        _clients(tables, best_first),
        _costs(tables, styles),
        _recorded(tables, styles),
        _events(tables),
    ]


def _headline(
    tables: RunTables,
    comparison: Comparison | None,
    data_set: DataSetComparison | None,
    styles: Mapping[str, int | None],
) -> Section:
    cards = [difference_card(comparison, data_set)] if comparison and data_set and data_set.differences else []
    scored = not final_means(tables).empty
    cards += [cost_card(tables, styles)] if scored and len(tables.methods) > 1 else []
    more = sheets(replace(comparison, data_sets=(data_set,))) if comparison and data_set else []
    notes = () if scored else ("No client has a score: the final pass had no test examples.",)
    return Section(
        "headline",
        "Methods",
        tuple(cards),
        (headline_sheet(tables, comparison if data_set else None, data_set),),
        more=tuple(more),
        notes=notes,
    )


def _curves(tables: RunTables, styles: Mapping[str, int | None]) -> Section:
    cards, notes = curve_cards(tables, styles)
    grey = [method for method, index in styles.items() if index is None]
    if grey:
        notes.append(
            f"The best methods and the references are in colour; the {len(grey)} others are grey, and named where the "
            "pointer is."
        )
    return Section("curves", "Learning curves", tuple(cards), notes=tuple(notes))


def _data(tables: RunTables) -> Section:
    cards, notes = partition_cards(tables.partition)
    if len(tables.runs) > 1 and cards:
        notes.append(f"Drawn for seed {tables.runs[0].config.seed}; other seeds may draw another partition.")
    return Section("data", "Data of the clients", tuple(cards), notes=tuple(notes))


def _clients(tables: RunTables, best_first: Sequence[str]) -> Section:
    card = clients_card(tables)
    if card is None:
        return Section("clients", "Clients", notes=("No client has a score.",))
    return Section("clients", "Clients", (card,), listings=(worst_listing(tables, best_first),))


def _costs(tables: RunTables, styles: Mapping[str, int | None]) -> Section:
    memory, no_memory = memory_card(tables)
    missed, no_missed = missed_card(tables, styles)
    cards = [traffic_card(tables), time_card(tables), *([memory] if memory else []), *([missed] if missed else [])]
    return Section("costs", "Costs", tuple(cards), notes=tuple(filter(None, (no_memory, no_missed))))


def _recorded(tables: RunTables, styles: Mapping[str, int | None]) -> Section:
    cards = recorded_cards(tables, styles)
    notes = [] if cards else ["No method recorded numbers of its own."]
    if "fedalt" in {entry.name for run in tables.runs for entry in run.config.method} and (
        tables.recorded.empty or "mixer_mean" not in set(tables.recorded["name"])
    ):
        notes.append("The mixer weights of FedALT are observed where clients are evaluated, and there are none here.")
    return Section("recorded", "What methods record", tuple(cards), notes=tuple(notes))


def _events(tables: RunTables) -> Section:
    events = tables.events
    title = "Event log"
    if events.empty:
        return Section("events", title, notes=("Nothing went wrong: the event log is empty.",))
    grouped = events.groupby(["method", "kind", "action"], sort=False).size().reset_index(name="count")
    counts = Listing(
        "How often",
        ("method", "what", "what was done", "times"),
        tuple(tuple(map(str, row)) for row in grouped.sort_values("count", ascending=False).itertuples(index=False)),
    )
    left = f"the last {EVENTS} of {len(events):,}, all are in events.parquet" if len(events) > EVENTS else "all"
    rows = [
        (
            pd.Timestamp(row["time"]).strftime("%Y-%m-%d %H:%M:%S"),
            str(row["method"]),
            str(round_number(int(row["server_round"]))),
            choices(row["clients"], 3),
            f"{row['kind']} on {row['node']}" if row["node"] else str(row["kind"]),
            str(row["cause"]),
            str(row["action"]),
        )
        for row in events.tail(EVENTS).to_dict("records")
    ]
    columns = ("time (UTC)", "method", "round", "clients", "what", "cause", "what was done")
    return Section("events", title, listings=(counts, Listing(f"Entries: {left}", columns, tuple(rows))))


def facts(config: Config, clients: int, methods: Collection[str], seeds: Iterable[int]) -> tuple[tuple[str, str], ...]:
    """Return what an experiment is, for the head of its report.

    Args:
        clients: their number.
    """
    model = config.model.path if config.model.path != "random" else f"random {config.model.config.get('model_type')}"
    return (
        ("task", config.task),
        ("model", PurePath(model).name if PurePath(model).is_absolute() else model),
        ("data", f"{config.data.source or config.data.class_}, {config.partition.name}"),
        ("clients", f"{clients:,}"),
        ("rounds", f"{config.rounds:,}"),
        ("methods", f"{len(methods)}"),
        ("seeds", choices(sorted(seeds), 5)),
        ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")),
    )


def repeating(place: StoragePath, command: str, file: str, configuration: str) -> tuple[Text, ...]:
    """Return the commands that repeat a run or a sweep, and its configuration.

    Args:
        command: of fedray, with which it was made.
        file: in the folder, with the configuration.
    """
    commands = (
        f"fedray {command} {place}/{file} --output {place}-again    # the same bits: state_sha256 in summary.json",
        f"fedray compare {place}",
        f"fedray report {place} --figures figures",
    )
    return Text("Commands to repeat it", "\n".join(commands)), Text("Configuration", configuration, folded=True)


def _versions(run: RunResult) -> Text:
    found, note = versions_of(run.place)
    lines = "\n".join(f"{name}=={version}" for name, version in found.items())
    return Text(f"Versions{note}", lines, folded=True)
