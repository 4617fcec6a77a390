"""Metrics against numbers derived by hand; the derivation stands in each docstring."""

import math

import numpy as np
import pytest

from fedray.config import load_config
from fedray.config.metric import METRICS
from fedray.errors import ConfigError
from fedray.evaluation.metrics import check_metric, default_metric
from fedray.evaluation.metrics.accuracy import Accuracy
from fedray.evaluation.metrics.exact_match import ExactMatch
from fedray.evaluation.metrics.matthews import Matthews
from fedray.evaluation.metrics.pearson import Pearson
from fedray.evaluation.metrics.perplexity import Perplexity
from fedray.evaluation.metrics.rouge_l import RougeL

accuracy, matthews, pearson = Accuracy().compute, Matthews().compute, Pearson().compute
perplexity, exact_match, rouge_l = Perplexity().compute, ExactMatch().compute, RougeL().compute


def test_accuracy_is_the_share_of_equal_entries():
    assert accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75


def test_matthews_by_its_confusion_matrix():
    """tp 3, tn 2, fp 1, fn 2: (3·2 - 1·2) / sqrt(4·5·3·4) = 4 / sqrt(240)."""
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 0, 1, 0, 0])
    assert matthews(predictions, labels) == pytest.approx(4 / math.sqrt(240), abs=1e-12)


def test_matthews_of_a_single_class_is_zero():
    assert matthews(np.array([1, 1, 1]), np.array([0, 1, 1])) == 0.0


def test_pearson_by_hand():
    """x - 2 = (-1, 0, 1), y - 3 = (-1, -2, 3): covariance sum 4, squares 2 and 14, so 4 / sqrt(28)."""
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 6.0])) == pytest.approx(4 / math.sqrt(28), abs=1e-12)


@pytest.mark.parametrize("sides", [([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]), ([1.0, 2.0], [5.0, 5.0]), ([1.0], [2.0])])
def test_pearson_of_a_constant_side_is_zero(sides):
    assert pearson(np.array(sides[0], dtype=np.float32), np.array(sides[1], dtype=np.float32)) == 0.0


def test_perplexity_is_the_inverse_geometric_mean_probability():
    """Probabilities 1/2, 1/4, 1/8 have the geometric mean 1/4."""
    assert perplexity(np.log([2.0, 4.0, 8.0])) == pytest.approx(4.0, rel=1e-12)


def test_perplexity_beyond_float64_is_infinite():
    assert perplexity(np.array([1e4])) == math.inf


def test_exact_match_ignores_case_spacing_and_outer_punctuation_only():
    predictions = ["  The  Answer. ", "it's", "its", "«42»", "", "!"]
    references = ["the answer", "It's!", "it's", "42", "x", ""]
    equal = [True, True, False, False, False, True]
    assert [bool(exact_match([p], [r])) for p, r in zip(predictions, references, strict=True)] == equal
    assert exact_match(predictions, references) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # police the gunman: P = R = 3/4
        ("the gunman kill police", "police killed the gunman", 0.5),  # the gunman: P = R = 2/4
        ("a b", "a x b y", 2 * 1.0 * 0.5 / 1.5),  # a b: P = 2/2, R = 2/4
        ("The CAT, sat!", "the cat sat", 1.0),  # neither case nor punctuation counts
        ("Öl ist teuer", "öl war teuer", 2 / 3),  # letters of any script
        ("", "something", 0.0),
        ("nothing", "else", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, expected):
    assert rouge_l([prediction], [reference]) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_needs_a_true_subsequence_not_common_words():
    """Of a b a against b a b the longest common subsequences are (b a) and (a b), length 2 of 3."""
    assert rouge_l(["a b a"], ["b a b"]) == pytest.approx(2 / 3, abs=1e-12)


def test_rouge_l_is_the_mean_over_examples():
    assert rouge_l(["a", "b"], ["a", "c"]) == 0.5


def test_generated_texts_and_references_must_pair_up():
    with pytest.raises(ValueError, match="longer"):
        rouge_l(["a"], ["a", "b"])


def test_metrics_by_name():
    assert METRICS.names == (
        "accuracy",
        "exact_match",
        "matthews",
        "pearson",
        "perplexity",
        "rouge_l",
        "token_accuracy",
    )
    assert METRICS.parse("token_accuracy").compute(np.array([1, 2]), np.array([1, 3])) == 0.5
    assert METRICS.find("rouge_l") is RougeL
    assert all(METRICS.find(name)().label == name for name in METRICS.names)


@pytest.mark.parametrize(
    ("task", "default"),
    [("classification", "accuracy"), ("regression", "pearson"), ("causal_lm", "token_accuracy")],
)
def test_every_task_has_a_default_that_fits_it(task, default):
    assert default_metric(task).label == default
    check_metric(default_metric(task), task)


def test_a_metric_that_does_not_fit_names_those_that_do():
    with pytest.raises(ConfigError, match=r"'rouge_l'.*'classification'.*accuracy, matthews"):
        check_metric(RougeL(), "classification")


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        load_config({"method": "local", "data": {"source": "synthetic"}, "evaluation": {"metric": "acuracy"}})


def test_only_perplexity_is_better_when_lower():
    names = ["accuracy", "matthews", "pearson", "token_accuracy", "exact_match", "rouge_l"]
    assert all(METRICS.find(name).higher_is_better for name in names)
    assert not METRICS.find("perplexity").higher_is_better


def test_correlations_and_perplexity_are_not_shown_in_percent():
    assert [name for name in METRICS.names if not METRICS.find(name).percent] == ["matthews", "pearson", "perplexity"]
