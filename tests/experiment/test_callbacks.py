"""Callbacks: which events they receive, those that a configuration names, and mistakes in naming them."""

from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config import dump_yaml, load_config, parse_yaml
from fedray.errors import ConfigError
from fedray.experiment.callbacks import build_callbacks

SPY = '''
import fedray


class Spy(fedray.Callback):
    """Writes the names of the events that it receives."""

    def __init__(self, path):
        self._path = path
        self._write("made")

    def on_event(self, event):
        super().on_event(event)
        self._write(type(event).__name__)

    def on_round_finished(self, event):
        self._write(f"round {event.server_round}, final: {event.final}")

    def _write(self, text):
        with open(self._path, "a") as file:
            print(text, file=file)


class NoCallback:
    pass
'''


@pytest.fixture
def own(own_folder: Path, smallest: dict[str, Any]) -> dict[str, Any]:
    """A configuration of one round beside `my_spy.py`, which it names."""
    (own_folder / "my_spy.py").write_text(SPY)
    return smallest | {"rounds": 1, "callbacks": [{"class": "my_spy.Spy", "path": "seen.txt"}]}


def test_a_configuration_names_callbacks(own: dict[str, Any], own_folder: Path) -> None:
    """Three clients are trained in the round and in the final pass; each event calls `on_event`, which calls the
    method that is named after it."""
    fedray.run(own, output="run")
    seen = [line for line in (own_folder / "seen.txt").read_text().splitlines() if line != "TasksFinished"]
    rounds = ["round 0, final: False", "RoundFinished", "round 1, final: True", "RoundFinished"]
    assert seen == ["made", "RunStarted", "MethodStarted", *rounds, "MethodFinished", "RunFinished"]


def test_they_are_in_the_resolved_configuration_and_change_no_result(own: dict[str, Any], own_folder: Path) -> None:
    config = load_config(own)
    assert load_config(parse_yaml(dump_yaml(config), "it")) == config
    with_one = fedray.run(own, output="one")
    without = fedray.run(own, callbacks=[], output="none")
    assert with_one.summaries[0].state_sha256 == without.summaries[0].state_sha256
    assert fedray.run(own | {"callbacks": []}, rounds=2, resume="one").summaries[0].rounds == 2


def test_none_is_made_for_an_experiment_that_cannot_begin(own: dict[str, Any], own_folder: Path) -> None:
    """A tracker would begin a run of its own."""
    with pytest.raises(ConfigError, match="num_labels: 5, but the data has 4 classes"):
        fedray.run(own, **{"model.config.num_labels": 5}, output="run")
    assert not (own_folder / "seen.txt").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": "my_spy.Spi"}, r"^callbacks.0: class 'my_spy.Spi' cannot be imported: AttributeError"),
        (
            {"class": "my_spy.NoCallback"},
            "^callbacks.0: my_spy.NoCallback must be a class derived from fedray.Cal",
        ),
        ({"class": "my_spy.Spy"}, "^callbacks.0: .*missing 1 required positional argument: 'path'"),
        ({"class": "my_spy.Spy", "path": "x", "paht": "y"}, "^callbacks.0: .*unexpected keyword argument 'paht'"),
    ],
)
def test_mistakes_are_named(own: dict[str, Any], entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_callbacks(load_config(own | {"callbacks": [entry]}))
