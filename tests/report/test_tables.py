"""What the figures show, from tables whose numbers can be derived by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_runs import personalised, write_run

from fedray.report.costs import missed_card, traffic_card
from fedray.report.curves import curve_cards
from fedray.report.figure import BYTES, Bars, Boxes, Heat, Lines, thinned, unit_of
from fedray.report.partition import partition_cards
from fedray.report.recorded import recorded_cards
from fedray.report.scores import clients_card, final_means, worst_listing
from fedray.report.style import STYLED, method_styles, style
from fedray.report.tables import RunTables, read_runs
from fedray.results.run_result import RunResult

SCORES = {"local": [0.2, 0.4, 0.9], "fedavg": [0.5, 0.7, 0.6]}
"""After the final pass, of the clients a, b and c."""


@pytest.fixture
def run(tmp_path: Path) -> RunResult:
    """Two rounds of two methods. fedavg sends 1 kB up and 2 kB down in every round; its three clients record λ, and
    memberships in two clusters."""
    found = write_run(tmp_path / "run", personalised(SCORES))
    rounds, clients = [], []
    for method in SCORES:
        sends = method == "fedavg"
        for number in range(3):
            phase = "final" if number == 2 else "train"
            at = {"method": method, "phase": phase, "server_round": number}
            rounds.append(
                {
                    **at,
                    **{"clients": 3, "late": number, "dropped_out": 0, "left_out": 0, "simulated_seconds": 5.0},
                    **{"train_loss": 2.0 - number / 2, "personalised_mean": 0.1 * number, "aggregated_mean": None},
                    **{"uplink_bytes": 1000 * sends, "downlink_bytes": 2000 * sends, "seconds": 1.0},
                    **({"cluster_0_size": 2.0, "cluster_1_size": 1.0} if sends and number < 2 else {}),
                }
            )
            for i, client in enumerate("abc"):
                score = SCORES[method][i] if phase == "final" else i / 2
                own = {"lam": i * number / 4, "clusters": [1.0, 0.0] if i else [0.4, 0.6]} if sends else {}
                clients.append({**at, "client": client, "personalised_metric": score, "test_examples": 10} | own)
    pd.DataFrame(rounds).to_parquet(found.path / "rounds.parquet")
    pd.DataFrame(clients).to_parquet(found.path / "clients.parquet")
    return found


@pytest.fixture
def tables(run: RunResult) -> RunTables:
    return read_runs([run])


STYLES = {"local": 0, "fedavg": 1}


def test_the_final_pass_and_its_means(tables: RunTables) -> None:
    means = final_means(tables)
    assert list(means.index) == ["fedavg", "local"], "the best first"
    assert means["mean"].tolist() == pytest.approx([0.6, 0.5])


def test_totals_grow_over_rounds_and_not_in_the_final_pass(tables: RunTables) -> None:
    mine = tables.rounds[tables.rounds["method"] == "fedavg"]
    assert mine["sent"].tolist() == [3000, 6000, 6000]
    assert mine["elapsed"].tolist() == [5, 10, 10]


def test_quantiles_over_clients(tables: RunTables) -> None:
    """Of 0, 1/2 and 1 the 10th percentile is 0.1, the median 1/2 and the 90th percentile 0.9."""
    row = tables.quantiles.query("method == 'local' and server_round == 0").iloc[0]
    assert row[["low", "median", "high"]].tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_curves_by_round_by_bytes_and_by_time(tables: RunTables) -> None:
    cards, notes = curve_cards(tables, STYLES)
    assert [card.title for card in cards] == ["Accuracy after local training", "Training loss"]
    assert notes == []
    by_round, by_bytes, by_time = cards[0].views.values()
    assert isinstance(by_round.marks, Lines)
    assert isinstance(by_bytes.marks, Lines)
    assert isinstance(by_time.marks, Lines)
    local, fedavg = by_round.marks.lines
    assert (local.x.tolist(), local.y.tolist()) == ([1, 2, 3], pytest.approx([0, 10, 20]))
    assert local.low.tolist()[:2] == pytest.approx([10, 10])
    assert [line.name for line in by_bytes.marks.lines] == ["fedavg"]
    assert by_bytes.marks.lines[0].x.tolist() == [3, 6, 6]
    assert "(kB)" in by_bytes.x.title
    assert "Not shown, because nothing is sent: local." in by_bytes.note
    assert by_time.marks.lines[1].x.tolist() == [5, 10, 10]
    assert by_round.marks.frame().columns.tolist() == ["name", "x", "y", "low", "high"]
    assert fedavg.style == 1


def test_scores_of_the_final_pass_alone_are_no_curve(tables: RunTables) -> None:
    scores = tables.rounds["personalised_mean"].where(tables.rounds["phase"] == "final")
    cards, notes = curve_cards(replace(tables, rounds=tables.rounds.assign(personalised_mean=scores)), STYLES)
    assert [card.title for card in cards] == ["Training loss"]
    assert notes[0].startswith("Scores were measured after the last round only")


def test_the_worst_clients_are_marked_and_named(tables: RunTables) -> None:
    card = clients_card(tables)
    assert card is not None
    (figure,) = card.views.values()
    assert isinstance(figure.marks, Boxes)
    fedavg, local = figure.marks.boxes
    assert (local.lowest, local.median, local.highest, local.mean) == pytest.approx((20, 40, 90, 50))
    assert list(fedavg.marked) == ["a", "c", "b"], "the worst first"
    assert worst_listing(tables, ["fedavg"]).rows == (("fedavg", "a: 50.0", "c: 60.0", "b: 70.0"),)


def test_traffic_and_missed_clients(tables: RunTables) -> None:
    bars = traffic_card(tables).views["all rounds"].marks
    assert isinstance(bars, Bars)
    assert bars.names == ("local", "fedavg")
    assert {part: values.tolist() for part, values in bars.values.items()} == {
        "up, from the clients": [0, 2],
        "down, to the clients": [0, 4],
    }
    per_client = traffic_card(tables).views["a client's round"].marks
    assert isinstance(per_client, Bars)
    assert per_client.values["up, from the clients"].tolist() == pytest.approx([0, 1 / 3]), (
        "kB: 2,000 bytes of six client rounds"
    )
    card, _ = missed_card(tables, STYLES)
    assert card is not None
    missed = card.views["all rounds"].marks
    assert isinstance(missed, Bars)
    assert missed.values["stragglers"].tolist() == [1, 1], "of the rounds 0 and 1; the final pass does not count"
    by_round = card.views["by round"].marks
    assert isinstance(by_round, Lines)
    assert len(by_round.lines) == 1, "both methods have the same cohorts"


def test_what_methods_record(tables: RunTables) -> None:
    """λ of the clients is 0, 1/4 and 1/2 in round 2; a is in cluster 1 with 0.6, b and c are in cluster 0."""
    cards = {card.title: card for card in recorded_cards(tables, STYLES)}
    assert list(cards) == ["λ of FedReFT", "Memberships in clusters", "Sizes of the clusters: fedavg"]
    lam = cards["λ of FedReFT"].views[""].marks
    assert isinstance(lam, Lines)
    assert [line.name for line in lam.lines] == ["fedavg"]
    assert lam.lines[0].y[1] == pytest.approx(0.25)
    assert (lam.lines[0].low[1], lam.lines[0].high[1]) == pytest.approx((0.05, 0.45))
    memberships = cards["Memberships in clusters"].views
    mean = memberships["fedavg: mean"].marks
    assert isinstance(mean, Lines)
    assert [line.y[0] for line in mean.lines] == pytest.approx([0.8, 0.2])
    clients = memberships["fedavg: clients"].marks
    assert isinstance(clients, Heat)
    assert dict(zip(clients.rows, clients.values[:, -1], strict=True)) == {"b": 0, "c": 0, "a": 1}
    sizes = cards["Sizes of the clusters: fedavg"].views[""].marks
    assert isinstance(sizes, Lines)
    assert [line.y.tolist() for line in sizes.lines] == [[2, 2], [1, 1]]


def test_several_seeds_have_bands_from_the_lowest_to_the_highest(run: RunResult, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", personalised(SCORES), seed=1)
    for name in ("rounds", "clients"):
        table = pd.read_parquet(run.path / f"{name}.parquet")
        if name == "rounds":
            table["personalised_mean"] += 0.5
        table.to_parquet(other.path / f"{name}.parquet")
    cards, _ = curve_cards(read_runs([run, other]), STYLES)
    marks = cards[0].views["by round"].marks
    assert isinstance(marks, Lines)
    first = marks.lines[0]
    assert (first.y[1], first.low[1], first.high[1]) == pytest.approx((35, 10, 60))
    assert "2 seeds" in cards[0].views["by round"].note


def test_clients_of_a_partition_are_ordered_by_what_they_hold_most() -> None:
    counts = {"a": {"x 2": 1, "x 10": 9}, "b": {"x 2": 5}, "c": {"x 10": 3}}
    rows = [
        {"client": client, "tier": "default", "split": "train", "kind": kind, "name": name, "examples": count}
        for client, classes in counts.items()
        for kind, found in (("all", {"": sum(classes.values())}), ("class", classes))
        for name, count in found.items()
    ]
    cards, notes = partition_cards(pd.DataFrame(rows))
    assert notes == []
    heat = cards[0].views["train examples"].marks
    assert isinstance(heat, Heat)
    assert heat.columns == ("x 2", "x 10")
    assert heat.rows == ("b", "c", "a"), "b holds only x 2; c holds only x 10, and a mostly"
    assert np.nan_to_num(heat.values, nan=-1).tolist() == [[5, -1], [-1, 3], [1, 9]]
    sizes = cards[1].views[""].marks
    assert isinstance(sizes, Bars)
    assert (sizes.names, sizes.values["train"].tolist()) == (("a", "b", "c"), [10, 5, 3])
    assert "no partition.parquet" in partition_cards(pd.DataFrame())[1][0]


def test_few_methods_have_a_style_each_and_of_many_the_best_ones() -> None:
    few = [f"m{i}" for i in range(8)]
    assert len({style(index) for index in method_styles(few, few, []).values()}) == 8
    many = [f"m{i}" for i in range(50)]
    found = method_styles(many, many[::-1], ["m0", "absent"])
    assert [name for name, index in found.items() if index is not None] == ["m0", *many[-STYLED:]]
    looks = [style(index) for index in found.values() if index is not None]
    assert len({(look.colour, look.dash) for look in looks}) == STYLED + 1


@given(st.integers(1, 10_000), st.integers(2, 300))
def test_thinned_points_are_few_and_keep_both_ends(count: int, most: int) -> None:
    found = thinned(count, most)
    assert len(found) == min(count, most)
    assert (found[0], found[-1]) == (0, count - 1)


def test_units() -> None:
    assert unit_of([10.0, 2_500_000.0], BYTES) == (1e6, "MB")
    assert unit_of([float("nan")], BYTES) == (1.0, "B")
