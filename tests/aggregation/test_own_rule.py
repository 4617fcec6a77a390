"""A rule of the user's own: one file, used by its path in a method's option. And what rules have in common."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import EXAMPLES

import fedray
from fedray.aggregation.rule import RULES, Rule
from fedray.aggregation.rules.trimmed_mean import TrimmedMean
from fedray.config import load_config
from fedray.config.registry import import_class
from fedray.errors import ConfigError
from fedray.methods.registry import build_method


@pytest.fixture
def own(own_folder: Path, smallest: dict[str, Any]) -> dict[str, Any]:
    """A configuration beside `my_rule.py`."""
    (own_folder / "my_rule.py").write_text(EXAMPLES["my_rule.py"])
    return smallest


@pytest.mark.parametrize(("method", "option"), [("fedalt", "rest"), ("fedreft", "aggregate")])
def test_it_aggregates(own: dict[str, Any], method: str, option: str) -> None:
    """Each of three clients has two others, whose median is their mean and whose minimum is not."""

    def states(rule: Any, name: str) -> str:
        return fedray.run(own, method={"name": method, option: rule}, output=name).summaries[0].state_sha256

    median = states({"class": "my_rule.Quantile"}, "median")
    assert median != states({"class": "my_rule.Quantile", "q": 0}, "minimum")
    if method == "fedalt":  # FedReFT's choice of λ follows the last bits
        result = fedray.run(own, method={"name": method, option: "mean"}, output="mean").summaries[0]
        own_mean = fedray.RunResult.load("median").summaries[0]
        assert own_mean.personalised_mean == result.personalised_mean


def test_leaving_one_out_needs_no_function(own: dict[str, Any]) -> None:
    points = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    rule = import_class("my_rule.Quantile")()
    expected = [np.median(np.delete(points, k, axis=0), axis=0) for k in range(5)]
    np.testing.assert_allclose(rule.leave_one_out(points), expected, atol=1e-6)
    assert rule.leave_one_out(points).dtype == np.float32


@pytest.mark.parametrize("name", RULES.names)
def test_builtin_rules_leave_one_out_as_one_after_another(name: str) -> None:
    points = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    rule = RULES.find(name)()
    assert rule.label == name
    np.testing.assert_allclose(rule.leave_one_out(points), Rule.leave_one_out(rule, points), atol=1e-5)


def test_a_builtin_rule_with_its_own_fields() -> None:
    rule = RULES.parse({"name": "trimmed_mean", "trim": 0.4, "smoothing": 1e-8})
    assert rule == TrimmedMean(trim=0.4)
    assert rule.model_dump() == {"name": "trimmed_mean", "trim": 0.4}
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert RULES.parse("mean").model_dump() == "mean"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"class": "my_rule.Quantile", "p": 0.1},
            "^method 'fedalt': rest.p: unknown key; allowed: q; with another `name`: ",
        ),
        ({"class": "my_rule.Quantile", "q": "half"}, "^method 'fedalt': rest.q: got 'half': "),
        ({"class": "my_rule.Quantil"}, "^method 'fedalt': rest: class 'my_rule.Quantil' cannot be imported"),
        ({"class": "collections.Counter"}, "rest: .* must be a class derived from fedray.aggregation.rule.Rule"),
        ({"class": "my_rule.Quantile", "name": "mean"}, "rest: expected either `name`"),
        ({"name": "trimmed_mean", "trim": 0.5}, "rest.trim: got 0.5: "),
        ({}, "rest: expected `name`"),
        ("meann", r"rest: unknown aggregation rule 'meann' \(did you mean 'mean'\?\)"),
    ],
)
def test_mistakes_are_named(own: dict[str, Any], rule: Any, message: str) -> None:
    config = load_config(own, {"method": {"name": "fedalt", "rest": rule}})
    with pytest.raises(ConfigError, match=message):
        build_method(config, config.method[0])


def test_a_class_without_the_function_is_refused(own: dict[str, Any], own_folder: Path) -> None:
    (own_folder / "broken_rule.py").write_text(EXAMPLES["my_rule.py"].replace("def everybody", "def all"))
    config = load_config(own, {"method": {"name": "fedalt", "rest": {"class": "broken_rule.Quantile"}}})
    with pytest.raises(ConfigError, match="TypeError: Quantile: has no function `everybody`"):
        build_method(config, config.method[0])


def test_an_option_of_the_method_has_no_effect_on_it(own: dict[str, Any]) -> None:
    config = load_config(own, {"method": {"name": "fedalt", "rest": {"class": "my_rule.Quantile"}, "trim": 0.1}})
    with pytest.raises(ConfigError, match="^fedalt.trim: has no effect without rest: trimmed_mean"):
        build_method(config, config.method[0])


def test_fedreft_takes_the_rules_of_its_paper(own: dict[str, Any]) -> None:
    for rule in ("trimmed_mean", {"name": "trimmed_mean"}):
        config = load_config(own, {"method": {"name": "fedreft", "aggregate": rule}})
        with pytest.raises(ConfigError, match="unknown aggregation rule .*; allowed: geometric_median, mean"):
            build_method(config, config.method[0])
