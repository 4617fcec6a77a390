"""What a run shows where there is no terminal: enough lines and not too many."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedray.evaluation.metrics.accuracy import Accuracy
from fedray.federation.events import MethodFinished, MethodStarted, RoundFinished, TasksFinished
from fedray.results import report
from fedray.results.report import LiveProgress


def lines(rounds: int, seconds_between: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    now = 100.0
    monkeypatch.setattr(report, "monotonic", lambda: now)
    out = StringIO()
    with LiveProgress(Console(file=out, width=140), Accuracy()) as progress:
        progress.on_event(MethodStarted("fedavg", rounds, 2 * rounds + 2))
        for server_round in range(rounds):
            now += seconds_between
            progress.on_event(TasksFinished("fedavg", server_round, ("a", "b")))
            progress.on_event(RoundFinished("fedavg", server_round, False, None, None, 0.5, 600_000, 400_000, 0.1))
        progress.on_event(RoundFinished("fedavg", rounds, True, 0.5, 0.75, 0.5, 0, 0, 0.1))
    return out.getvalue().splitlines()


def test_slow_rounds_have_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(3, 10.0, monkeypatch)
    assert found[0] == "fedavg: 3 rounds"
    assert [line.split(": ")[1] for line in found[1:]] == ["round 1", "round 2", "round 3", "final pass"]
    assert "loss 0.500, 2.0 MB sent, 0.1 s" in found[2]
    assert "aggregated 50.0 %, personalised 75.0 %, 3.0 MB sent" in found[-1]


def test_a_driver_that_was_started_again_begins_its_bar_anew() -> None:
    out = StringIO()
    summary = SimpleNamespace(method="b")
    with LiveProgress(Console(file=out, width=140), Accuracy()) as progress:
        for method in ("a", "b", "b"):
            progress.on_event(MethodStarted(method, 1, 4, server_round=int(method == "b")))
            progress.on_event(RoundFinished(method, 0, False, None, None, 0.5, 5, 5, 0.1))
        progress.on_event(MethodFinished(summary))  # type: ignore[arg-type]
    assert out.getvalue().count("b: 1 rounds, continued after 1") == 2


def test_what_was_not_measured_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A final pass without training, and a round in which no client took part."""
    monkeypatch.setattr(report, "monotonic", lambda: 100.0)
    out = StringIO()
    with LiveProgress(Console(file=out, width=140), Accuracy()) as progress:
        progress.on_event(MethodStarted("fedavg", 1, 4))
        progress.on_event(RoundFinished("fedavg", 0, False, None, None, None, 0, 0, 0.1))
        progress.on_event(RoundFinished("fedavg", 1, True, 0.5, None, None, 0, 2_000, 0.1))
    _, first, final = out.getvalue().splitlines()
    assert first.startswith("fedavg: round 1: nothing trained or measured, 0 B sent")
    assert final.startswith("fedavg: final pass: aggregated 50.0 %, 2.0 kB sent")


def test_quick_rounds_share_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand rounds of 5 ms are 50 s."""
    found = lines(10_000, 0.005, monkeypatch)
    assert 20 <= len(found) <= 30
    assert "10.0 GB sent" in found[-1]
