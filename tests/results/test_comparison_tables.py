"""The tables of a comparison: what the cells say, what is bold, and that every format is well formed."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from written_runs import personalised, write_run

from fedray.evaluation.metrics.accuracy import Accuracy
from fedray.federation.summary import Summary
from fedray.results.comparison import Comparison, compare
from fedray.results.comparison_tables import sheets
from fedray.results.report import readable_count, summary_table
from fedray.results.run_result import RunResult
from fedray.results.sheets import WIDTH, plain_text


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    """Twelve clients, two seeds. Every client of fedavg_reft gains 20 points over local, and of fedavg loses 10."""
    local = [0.3 + i / 100 for i in range(12)]
    scores = personalised(
        {"local": local, "fedavg_reft": [a + 0.2 for a in local], "fedavg": [a - 0.1 for a in local]}, examples=25
    )
    return compare([write_run(tmp_path / str(seed), scores, seed=seed) for seed in (0, 1)])


def rows(found: Comparison, sheet: int) -> list[list[str]]:
    return [[cell.text for cell in row] for row in sheets(found)[sheet].rows]


def test_the_cells_of_the_scores(found: Comparison) -> None:
    """Means 35.5 + 20 and − 10; all seeds alike; the bottom decile is the second worst of twelve."""
    sheet = sheets(found)[0]
    assert (
        sheet.title == "run: accuracy in %, personalised; 2 seeds (0, 1), 12 clients with 25 test examples on average"
    )
    heads = [" ".join(name.split()) for name in sheet.columns]
    assert heads == [
        *("method", "mean", "± of seeds", "worst client", "bottom decile", "± of a client"),
        *("hurt by training", "hurt vs local"),
    ]
    assert [row[:5] for row in rows(found, 0)] == [
        ["local", "35.5", "0.0", "30.0", "31.0"],
        ["fedavg_reft", "55.5", "0.0", "50.0", "51.0"],
        ["fedavg", "25.5", "0.0", "20.0", "21.0"],
    ]
    assert [row[6:] for row in rows(found, 0)] == [["0", "-"], ["0", "0"], ["0", "100"]]
    best = [cell.text for row in sheet.rows for cell in row if cell.best]
    assert best == ["0", "55.5", "50.0", "51.0", "0", "0"], "of means, worst, deciles and shares that were hurt"


def test_the_cells_of_the_differences(found: Comparison) -> None:
    """Equal differences have intervals of one point, no t test, and with two seeds the sign flip's p is 1/2; Holm makes
    two of them 1."""
    assert rows(found, 1) == [
        ["fedavg_reft", "+20.0", "[+20.0, +20.0]", "[+20.0, +20.0]", "100/0/0", "-", "1.000"],
        ["fedavg", "-10.0", "[-10.0, -10.0]", "[-10.0, -10.0]", "0/0/100", "-", "1.000"],
    ]
    assert [row[1] for row in rows(found, 2)] == ["+10.0", "+30.0"], "local and fedavg_reft against fedavg"
    assert sheets(found)[2].notes[0].startswith("2 seeds: the smallest p of the sign-flip test is 0.5; the bootstrap")


def test_one_seed_is_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", personalised({"local": [0.1, 0.2], "fedavg": [0.3, 0.2]}))
    sheet = sheets(run.compare())[1]
    assert sheet.columns == ("method", "Δ to\nlocal", "95 %,\nclients only", "win/tie/loss\n% of clients")
    assert "± of\nseeds" not in sheets(run.compare())[0].columns


def test_text_fits_its_width(found: Comparison) -> None:
    lines = plain_text(sheets(found)).splitlines()
    assert max(map(len, lines)) <= WIDTH == 100
    assert any("fedavg_reft  +20.0  [+20.0, +20.0]" in line for line in lines)
    assert "…" not in plain_text(sheets(found)), "nothing is cut off"


def test_markdown_is_a_table(found: Comparison) -> None:
    blocks = found.to_markdown().split("\n\n")
    table = blocks[1].splitlines()
    assert table[0].startswith("| method | mean | ± of seeds |")
    assert table[1] == "|---|" + "---:|" * 7
    assert {line.count("|") for line in table} == {9}
    assert table[3].startswith("| fedavg_reft | **55.5** | 0.0 | **50.0** |")


def test_latex_is_a_tabular_of_booktabs(found: Comparison) -> None:
    text = found.to_latex()
    assert text.count(r"\begin{tabular}{lrrrrrrr}") == 1
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 3
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert r"fedavg\_reft & \textbf{55.5} & 0.0 & \textbf{50.0} & \textbf{51.0}" in text
    assert r"fedavg & $-$10.0 & [$-$10.0, $-$10.0]" in text
    assert {line.count(" & ") for line in body[:4]} == {7}
    outside = [line for line in text.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(outside)), "escaped everywhere but in comments"


def test_the_frame_has_one_row_for_each_method_and_reference(found: Comparison) -> None:
    frame = found.to_pandas()
    assert len(frame) == 3 * 2
    row = frame[(frame.method == "fedavg_reft") & (frame.reference == "fedavg")].iloc[0]
    assert (row["data_set"], row["seeds"], row["win"]) == ("run", 2, 1)
    assert row["delta"] == pytest.approx(0.3)
    assert frame[frame.method == frame.reference].delta.isna().all()


def test_ranks_as_text(tmp_path: Path) -> None:
    """Six data sets: letters for groups, the critical difference, and Friedman's p (see test_comparison)."""
    runs = []
    for i in range(6):
        a, b = (0.1, 0.2) if i % 2 else (0.2, 0.1)
        scores = personalised({"local": [a] * 2, "fedavg": [b] * 2, "fedalt": [0.5 + i / 100] * 2})
        fields = {"data.examples_per_client": 10 + i, "name": f"data{i}"}
        runs.append(write_run(tmp_path / str(i), scores, data=str(i), **fields))
    sheet = sheets(compare(runs))[-1]
    assert [[cell.text for cell in row] for row in sheet.rows] == [
        ["fedalt", "1.00", "-", "0.062"],
        ["local", "2.50", "a", "-"],
        ["fedavg", "2.50", "a", "1.000"],
    ]
    assert "(Nemenyi): 1.35" in sheet.notes[0]
    assert sheet.notes[1].endswith("p = 0.011")
    assert max(map(len, plain_text(sheets(compare(runs))).splitlines())) <= WIDTH
    few = sheets(compare(runs[:2]))[-1]
    assert few.columns == ("method", "mean rank")
    assert few.notes == ("2 data sets: ranks are tested from six on",)


def long_summaries(run: RunResult) -> list[Summary]:
    return [
        Summary(
            **vars(one)
            | {
                "head": "shared",
                "personalised_mean": 0.9,
                "personalised_worst": 0.1,
                "aggregated_mean": None,
                "trainable_parameters": 28_965_000,
                "uplink_bytes": 999_900_000,
                "downlink_bytes": 999_900_000,
                "wall_seconds": 12345.0,
            }
        )
        for one in run.summaries
    ]


def test_a_runs_summary_fits_a_hundred_columns(tmp_path: Path) -> None:
    scores = personalised({"local": [0.1, 0.3], "fedavg": [0.9, 0.5], "fedhft-half": [0.0, 0.1]})
    run = write_run(tmp_path / "0", scores)
    out = StringIO()
    Console(file=out, width=100).print(summary_table(long_summaries(run), Accuracy(), run.compare()))
    lines = out.getvalue().splitlines()
    assert not any("…" in line for line in lines), "nothing is cut off"
    assert re.search(r"fedavg +shared +90.0 +\+50.0 \[\+20.0, \+80.0\] +10.0 +- +29.0 M", "\n".join(lines))
    assert re.search(r"local +shared +90.0 +- +10.0", "\n".join(lines))
    assert "Δ to local" in out.getvalue()
    assert "95 % over clients" in out.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (99_999, "99,999"), (131_478, "131.5 k"), (28_965_000, "29.0 M"), (8_030_261_248, "8.0 G")],
)
def test_counts_as_tables_show_them(count: int, text: str) -> None:
    assert readable_count(count) == text
