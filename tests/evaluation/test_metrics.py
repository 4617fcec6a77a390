"""Metrics against numbers derived by hand; the derivation stands in each docstring."""

import ast
import inspect
import math
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_config import SMALLEST

from fedray.config import EvaluationConfig, load_config
from fedray.config.metric import METRICS
from fedray.errors import ConfigError
from fedray.evaluation.metrics import check_metric, configured_metrics, default_metric, for_classes, glue_metrics
from fedray.evaluation.metrics.accuracy import Accuracy
from fedray.evaluation.metrics.combined import Combined
from fedray.evaluation.metrics.exact_match import ExactMatch
from fedray.evaluation.metrics.f1 import F1
from fedray.evaluation.metrics.macro_f1 import MacroF1
from fedray.evaluation.metrics.matthews import Matthews
from fedray.evaluation.metrics.pearson import Pearson
from fedray.evaluation.metrics.perplexity import Perplexity
from fedray.evaluation.metrics.rouge_l import RougeL
from fedray.evaluation.metrics.spearman import Spearman

accuracy, matthews, pearson = Accuracy().compute, Matthews().compute, Pearson().compute
spearman, combined = Spearman().compute, Combined().compute
perplexity, exact_match, rouge_l = Perplexity().compute, ExactMatch().compute, RougeL().compute

PUBLISHED_ROUGE = {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_accuracy_is_the_share_of_equal_entries():
    assert accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75


def test_matthews_by_its_confusion_matrix():
    """tp 3, tn 2, fp 1, fn 2: (3·2 - 1·2) / sqrt(4·5·3·4) = 4 / sqrt(240)."""
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 0, 1, 0, 0])
    assert matthews(predictions, labels) == pytest.approx(4 / math.sqrt(240), abs=1e-12)


def test_matthews_of_a_single_class_is_zero():
    assert matthews(np.array([1, 1, 1]), np.array([0, 1, 1])) == 0.0


def test_f1_by_its_confusion_matrix():
    """Class 1: tp 3, fp 1, fn 2: P = 3/4, R = 3/5, F1 = 2·3 / (2·3 + 1 + 2) = 2/3. Class 0: tp 2, fp 2, fn 1: 4/7."""
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 0, 1, 0, 0])
    assert F1().compute(predictions, labels) == pytest.approx(2 / 3, abs=1e-12)
    assert F1(positive=0).compute(predictions, labels) == pytest.approx(4 / 7, abs=1e-12)
    assert MacroF1().compute(predictions, labels) == pytest.approx((2 / 3 + 4 / 7) / 2, abs=1e-12)


def test_f1_of_one_class_among_three():
    """Class 2 against the rest: tp 1, fp 1, fn 0."""
    assert F1(positive=2).compute(np.array([2, 2, 0, 1]), np.array([2, 1, 1, 0])) == pytest.approx(2 / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("predictions", "labels", "f1", "macro"),
    [
        ([0, 0], [0, 0], 0.0, 1.0),  # neither side has class 1, which macro F1 then leaves out
        ([0, 0], [0, 1], 0.0, 1 / 3),  # class 0: P = 1/2, R = 1; class 1: 0
        ([1, 1], [0, 0], 0.0, 0.0),
        ([1, 1], [1, 1], 1.0, 1.0),
        ([0], [1], 0.0, 0.0),
    ],
)
def test_f1_where_a_class_is_missing(predictions, labels, f1, macro, recwarn):
    assert F1().compute(np.array(predictions), np.array(labels)) == f1
    assert MacroF1().compute(np.array(predictions), np.array(labels)) == pytest.approx(macro, abs=1e-12)
    assert not recwarn.list


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_macro_f1_is_the_mean_over_the_classes_that_occur(pairs):
    """An independent formula of F1: 2·tp / (number of predictions + number of labels)."""
    predictions, labels = np.array(pairs).T
    classes = set(predictions) | set(labels)
    sizes = {c: np.sum(predictions == c) + np.sum(labels == c) for c in classes}
    f1 = {c: 2 * np.sum((predictions == c) & (labels == c)) / sizes[c] for c in classes}
    assert MacroF1().compute(predictions, labels) == pytest.approx(np.mean(list(f1.values())), abs=1e-12)
    for c in range(4):
        assert F1(positive=c).compute(predictions, labels) == pytest.approx(f1.get(c, 0.0), abs=1e-12)


def test_the_positive_class_by_name():
    """Sorted, GLUE's class 1 of MRPC comes first."""
    names = ("equivalent", "not_equivalent")
    metric = F1(positive="equivalent").for_classes(names)
    assert metric == F1(positive=0)
    assert metric.for_classes(names) == metric
    assert F1().for_classes(names) == F1(positive=1)
    assert Accuracy().for_classes(names) == Accuracy()


@pytest.mark.parametrize(
    ("positive", "message"),
    [
        (
            "equivalant",
            "metric f1: positive: the data has no class 'equivalant' (did you mean 'equivalent'?); allowed: ",
        ),
        (2, "metric f1: positive: got the index 2, but the data has the 2 classes equivalent, not_equivalent; use a "),
    ],
)
def test_a_positive_class_that_the_data_lacks(positive, message):
    with pytest.raises(ConfigError) as caught:
        F1(positive=positive).for_classes(("equivalent", "not_equivalent"))
    assert str(caught.value).startswith(message)


def test_a_section_is_bound_to_the_classes():
    assert for_classes(load_config(SMALLEST), ("a", "b")).metrics == (Accuracy(),)
    config = load_config(SMALLEST | {"evaluation": {"metrics": [F1(positive="b"), "accuracy"], "every": 3}})
    bound = for_classes(config, ("a", "b", "c"))
    assert bound == EvaluationConfig(metrics=[F1(positive=1), Accuracy()], every=3)


def test_pearson_by_hand():
    """x - 2 = (-1, 0, 1), y - 3 = (-1, -2, 3): covariance sum 4, squares 2 and 14, so 4 / sqrt(28)."""
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 6.0])) == pytest.approx(4 / math.sqrt(28), abs=1e-12)


@pytest.mark.parametrize("sides", [([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]), ([1.0, 2.0], [5.0, 5.0]), ([1.0], [2.0])])
def test_pearson_of_a_constant_side_is_zero(sides):
    assert pearson(np.array(sides[0], dtype=np.float32), np.array(sides[1], dtype=np.float32)) == 0.0


def test_spearman_by_hand():
    """Ranks (1, 2, 3, 4) and (2, 1, 3, 4): 1 − 6·(1 + 1) / (4·15) = 0.8, however far apart the numbers are."""
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 30.0, 400.0])) == pytest.approx(0.8, abs=1e-12)


def test_spearman_of_ties():
    """Ranks (1.5, 1.5, 3) and (1, 2, 3): deviations (−½, −½, 1) and (−1, 0, 1), so 1.5 / sqrt(1.5 · 2)."""
    expected = 1.5 / math.sqrt(3)
    assert spearman(np.array([5.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sides", [([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]), ([1.0, 2.0], [5.0, 5.0]), ([1.0], [2.0])])
def test_rank_correlations_of_a_constant_side_are_zero(sides, recwarn):
    x, y = (np.array(side, dtype=np.float32) for side in sides)
    assert (spearman(x, y), combined(x, y)) == (0.0, 0.0)
    assert not recwarn.list


def test_combined_is_the_mean_of_both():
    """Pearson 4 / sqrt(28) as above; ranks (1, 2, 3) and (2, 1, 3): Spearman 1 − 6·2 / (3·8) = 0.5."""
    x, y = np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 6.0])
    assert combined(x, y) == pytest.approx((4 / math.sqrt(28) + 0.5) / 2, abs=1e-12)


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
    expected = """accuracy combined exact_match extracted_match f1 macro_f1 matthews multiple_choice pearson perplexity
    rouge1 rouge2 rougeL rougeLsum rouge_l spearman token_accuracy"""
    assert METRICS.names == tuple(expected.split())
    assert METRICS.parse("token_accuracy").compute(np.array([1, 2]), np.array([1, 3])) == 0.5
    assert METRICS.find("rouge_l") is RougeL
    assert all(METRICS.find(name)().label == name for name in METRICS.names if name != "extracted_match")


def test_no_two_metrics_share_a_file_where_case_does_not_count():
    assert len({name.casefold() for name in METRICS.names}) == len(METRICS.names)


@pytest.mark.parametrize(
    ("task", "default"),
    [("classification", "accuracy"), ("regression", "pearson"), ("causal_lm", "token_accuracy")],
)
def test_every_task_has_a_default_that_fits_it(task, default):
    assert default_metric(task).label == default
    check_metric(default_metric(task), task)


def test_a_metric_that_does_not_fit_names_those_that_do():
    with pytest.raises(ConfigError, match=r"'rouge_l'.*'classification'.*accuracy, f1, macro_f1, matthews"):
        check_metric(RougeL(), "classification")


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        load_config({"method": "local", "data": {"source": "synthetic"}, "evaluation": {"metric": "acuracy"}})


def test_only_perplexity_is_better_when_lower():
    assert [name for name in METRICS.names if not METRICS.find(name).higher_is_better] == ["perplexity"]


def test_correlations_and_perplexity_are_not_shown_in_percent():
    expected = ["combined", "matthews", "pearson", "perplexity", "spearman"]
    assert [name for name in METRICS.names if not METRICS.find(name).percent] == expected


@pytest.mark.parametrize(
    ("config_name", "labels"),
    [
        ("cola", ["matthews"]),
        ("sst2", ["accuracy"]),
        ("mrpc", ["accuracy", "f1"]),
        ("stsb", ["pearson", "spearman", "combined"]),
        ("qqp", ["accuracy", "f1"]),
        ("mnli", ["accuracy"]),
        ("mnli_mismatched", ["accuracy"]),
        ("qnli", ["accuracy"]),
        ("rte", ["accuracy"]),
        ("wnli", ["accuracy"]),
    ],
)
def test_metrics_of_glue(config_name, labels):
    """As `evaluate`'s metrics/glue returns them, and STS-B's mean."""
    metrics = glue_metrics(config_name)
    assert [metric.label for metric in metrics] == labels
    for metric in metrics:
        check_metric(metric, "regression" if config_name == "stsb" else "classification")


@pytest.mark.parametrize(
    ("config_name", "names"),
    [("mrpc", ("not_equivalent", "equivalent")), ("qqp", ("not_duplicate", "duplicate"))],
)
def test_glue_counts_the_f1_of_its_class_1(config_name, names):
    """The names are those of the hub in its own order; fedray sorts them."""
    f1 = glue_metrics(config_name)[1].for_classes(sorted(names))
    ours = [sorted(names).index(names[label]) for label in (1, 1, 1, 0)]
    predicted = [sorted(names).index(names[label]) for label in (1, 1, 0, 0)]
    assert f1.compute(np.array(predicted), np.array(ours)) == pytest.approx(0.8)  # P = 1, R = 2/3


def test_a_task_of_glue_has_its_metrics_by_default():
    """Only from the hub, and only where the configuration names none."""
    glue = {"source": "hub", "name": "nyu-mll/glue", "config": "qqp"}
    assert configured_metrics(load_config(SMALLEST | {"data": glue})) == glue_metrics("qqp")
    chosen = SMALLEST | {"data": glue, "evaluation": {"metric": "matthews"}}
    assert configured_metrics(load_config(chosen)) == (Matthews(),)
    other = SMALLEST | {"data": glue | {"name": "some/other"}}
    assert configured_metrics(load_config(other)) == (Accuracy(),)


def test_glue_has_no_other_task():
    with pytest.raises(ConfigError, match=r"^GLUE has no task 'mnil' \(did you mean 'mnli'\?\); allowed: cola, sst2"):
        glue_metrics("mnil")


@pytest.mark.parametrize("name", METRICS.names)
def test_what_is_imported_late_is_declared(name: str) -> None:
    """A worker imports `libraries` when it is set up, so that they are in no client's time and memory."""
    metric = METRICS.find(name)
    compute = ast.parse(dedent(inspect.getsource(metric.compute)))
    late = {node.module for node in ast.walk(compute) if isinstance(node, ast.ImportFrom)}
    late |= {alias.name for node in ast.walk(compute) if isinstance(node, ast.Import) for alias in node.names}
    assert late <= set(metric.libraries)
    assert bool(metric.libraries) == (name in {"matthews", "f1", "macro_f1", "spearman", "combined"} | PUBLISHED_ROUGE)
