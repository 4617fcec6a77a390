"""A metric of the user's own: one file, used by its path in the configuration."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from examples import EXAMPLES

import fedray
from fedray.config import dump_yaml, load_config, to_mapping
from fedray.errors import ConfigError
from fedray.evaluation.metrics.rouge_l import RougeL
from fedray.experiment.prepare import prepare


@pytest.fixture
def own(own_folder: Path, smallest: dict[str, Any]) -> dict[str, Any]:
    """A configuration beside `my_metric.py`."""
    (own_folder / "my_metric.py").write_text(EXAMPLES["my_metric.py"])
    return smallest


def measured(config: dict[str, Any], metric: Any, folder: str) -> Any:
    return fedray.run(config, evaluation={"metric": metric}, output=folder)


def test_it_is_measured_in_every_round(own: dict[str, Any]) -> None:
    """With weight 1 it is 1 − accuracy, of every client; the worst client is the one with the largest."""
    accuracy = measured(own, "accuracy", "builtin")
    errors = measured(own, {"class": "my_metric.ErrorRate"}, "own")
    assert errors.summaries[0].state_sha256 == accuracy.summaries[0].state_sha256
    assert errors.summaries[0].metric_name == "ErrorRate"
    wrong, right = (run.clients()["personalised_metric"] for run in (errors, accuracy))
    assert wrong.to_numpy() == pytest.approx(1 - right.to_numpy())
    final = errors.clients().query("phase == 'final'")["personalised_metric"]
    assert errors.summaries[0].personalised_worst == final.max()


def test_its_field_changes_the_value(own: dict[str, Any]) -> None:
    one, nine = (
        measured(own, {"class": "my_metric.ErrorRate", "weight": weight}, f"run-{weight}").clients()
        for weight in (1, 9)
    )
    assert not one["aggregated_metric"].equals(nine["aggregated_metric"])


def test_it_survives_yaml_and_pickling(own: dict[str, Any], own_folder: Path) -> None:
    """Also into a process that has never imported its file."""
    config = load_config(own, {"evaluation.metric": {"class": "my_metric.ErrorRate", "weight": 3}})
    assert to_mapping(config)["evaluation"]["metrics"] == [{"class": "my_metric.ErrorRate", "weight": 3.0}]
    (own_folder / "config.yaml").write_text(dump_yaml(config))
    assert load_config("config.yaml") == load_config(config) == pickle.loads(pickle.dumps(config)) == config
    (own_folder / "pickled").write_bytes(pickle.dumps(config))
    code = "import pickle; print(pickle.load(open('pickled', 'rb')).evaluation.metrics[0].weight)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "3.0\n"


def test_an_instance_is_a_value_of_the_configuration(own: dict[str, Any]) -> None:
    from fedray.config.registry import import_class

    metric = import_class("my_metric.ErrorRate")(weight=2)
    config = load_config(own, {"evaluation.metric": metric})
    assert config.evaluation.metrics[0] == metric
    assert load_config(own, {"evaluation.metric": RougeL()}).evaluation.metrics[0] == RougeL()


def test_a_name_of_its_own_is_shown(own: dict[str, Any], own_folder: Path) -> None:
    (own_folder / "named_metric.py").write_text(
        EXAMPLES["my_metric.py"].replace("    tasks =", '    name = "wrong"\n    tasks =')
    )
    config = load_config(own, {"evaluation.metric": {"class": "named_metric.ErrorRate"}})
    assert config.evaluation.metrics
    assert config.evaluation.metrics[0].label == "wrong"
    assert load_config(to_mapping(config)) == config


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            {"class": "my_metric.ErrorRate", "wieght": 2},
            r"evaluation.metrics.0.wieght: unknown key \(did you mean 'weight'\?\); allowed: weight",
        ),
        ({"class": "my_metric.ErrorRate", "weight": "much"}, "evaluation.metrics.0.weight: got 'much': "),
        ({"class": "my_metric.ErrorRate", "weight": True}, "evaluation.metrics.0.weight: expected a number, got true"),
        ({"class": "my_metric.ErrorRat"}, "evaluation.metrics.0: class 'my_metric.ErrorRat' cannot be imported: Attr"),
        ({"class": "collections.Counter"}, "must be a class derived from fedray.config.metric.Metric"),
        ({"class": "my_metric.ErrorRate", "name": "accuracy"}, "evaluation.metrics.0: expected either `name`"),
        ({"name": "accuracy", "top": 5}, "evaluation.metrics.0.top: unknown key"),
        ({}, "evaluation.metrics.0: expected `name` "),
        ("accurracy", r"evaluation.metrics.0: unknown metric 'accurracy' \(did you mean 'accuracy'\?\)"),
        (7, "evaluation.metrics.0: expected `name` .* got 7"),
    ],
)
def test_mistakes_are_named(own: dict[str, Any], metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(own, {"evaluation.metric": metric})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('("classification",)', "()", r"ErrorRate.tasks: expected some of .*got \(\)"),
        ('"classification"', '"clasification"', "ErrorRate.tasks: expected some of "),
        ("percent = False", "reads = 'logits'", "ErrorRate.reads: expected one of .*got 'logits'"),
        ("def compute", "def calculate", "ErrorRate: has no function `compute`"),
    ],
)
def test_a_class_that_cannot_be_used(
    own: dict[str, Any], own_folder: Path, before: str, after: str, message: str
) -> None:
    (own_folder / "broken_metric.py").write_text(EXAMPLES["my_metric.py"].replace(before, after))
    with pytest.raises(ConfigError, match=f"evaluation.metrics.0: class .* cannot be imported: TypeError: {message}"):
        load_config(own, {"evaluation.metric": {"class": "broken_metric.ErrorRate"}})


def test_it_must_fit_the_task(own: dict[str, Any], own_folder: Path) -> None:
    (own_folder / "other_task.py").write_text(EXAMPLES["my_metric.py"].replace("classification", "regression"))
    config = load_config(own, {"evaluation.metric": {"class": "other_task.ErrorRate"}})
    with pytest.raises(ConfigError, match="'ErrorRate' cannot be computed for the task 'classification'; allowed: acc"):
        prepare(config)


def test_loading_a_configuration_imports_no_torch(own: dict[str, Any], own_folder: Path) -> None:
    (own_folder / "config.yaml").write_text(dump_yaml(load_config(own, {"evaluation.metric": "rouge_l"})))
    code = "import fedray.config as c, sys; c.load_config('config.yaml'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
