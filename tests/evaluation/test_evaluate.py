"""Evaluation of whole tables: means, independence of batching, generation, and what it leaves behind."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from letters import Letters, table

from fedray.config.metric import METRICS
from fedray.errors import ConfigError
from fedray.evaluation.evaluate import evaluate
from fedray.evaluation.generation import Decoding, generate
from fedray.types import Evaluation


@pytest.mark.parametrize(
    ("task", "metric"),
    [("classification", "accuracy"), ("classification", "matthews"), ("regression", "pearson")],
)
def test_results_do_not_depend_on_batch_size_or_order(bert, examples, task, metric):
    model, rows = bert(1 if task == "regression" else 3), examples(task, 23)
    one = evaluate(model, rows, task, [METRICS.parse(metric)], 1, 0, "cpu")
    for size, order in [(5, slice(None)), (64, slice(None)), (4, slice(None, None, -1))]:
        other = evaluate(model, rows.take(np.arange(23)[order]), task, [METRICS.parse(metric)], size, 0, "cpu")
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.metric == pytest.approx(one.metric, rel=1e-5)
        assert other.num_examples == 23


@pytest.mark.parametrize("metric", ["token_accuracy", "perplexity"])
def test_language_model_results_do_not_depend_on_batch_size(llama, examples, metric):
    rows = examples("causal_lm", 23)
    one, five = (evaluate(llama, rows, "causal_lm", [METRICS.parse(metric)], size, 0, "cpu") for size in (1, 5))
    assert five.loss == pytest.approx(one.loss, rel=1e-5)
    assert five.metric == pytest.approx(one.metric, rel=1e-5)


def test_repeating_gives_the_same_bits(bert, examples):
    model, rows = bert(3), examples("classification", 9)
    assert evaluate(model, rows, "classification", [METRICS.parse("accuracy")], 4, 0, "cpu") == evaluate(
        model, rows, "classification", [METRICS.parse("accuracy")], 4, 0, "cpu"
    )


def test_accuracy_and_loss_are_means_over_examples_not_batches(bert, examples):
    """Three examples in batches of 2: a mean over batches would count the shortest one twice."""
    model, rows = bert(3), examples("classification", 3)
    single = [
        evaluate(model, rows.slice(i, 1), "classification", [METRICS.parse("accuracy")], 1, 0, "cpu") for i in range(3)
    ]
    together = evaluate(model, rows, "classification", [METRICS.parse("accuracy")], 2, 0, "cpu")
    assert len({round(one.loss, 3) for one in single}) == 3
    assert together.loss == pytest.approx(np.mean([one.loss for one in single]), rel=1e-6)
    assert together.metric == pytest.approx(np.mean([one.metric for one in single]), rel=1e-6)


def test_perplexity_and_loss_weigh_answer_tokens(lookup):
    """Every token has 40 equally likely successors, only token 4 goes to 5 with probability 39 / (39 + 39) = 1/2.

    Answers: (4 after 3), (5 after 4, 6 after 5): probabilities 1/40, 1/2, 1/40, so perplexity is 3200^(1/3), and the
    loss its logarithm. A mean over examples would give (40 · √80)^(1/2) instead.
    """
    logits = torch.zeros(40, 40)
    logits[4, 5] = math.log(39)
    rows = table([[3, 4], [4, 5, 6]], [1, 1])
    result = evaluate(lookup(logits), rows, "causal_lm", [METRICS.parse("perplexity")], 1, 0, "cpu")
    assert result.metric == pytest.approx(3200 ** (1 / 3), rel=1e-6)
    assert result.loss == pytest.approx(math.log(3200) / 3, rel=1e-6)
    assert result.num_examples == 2


def test_token_accuracy_counts_answer_tokens_only(alphabet):
    """Answers: 4 (right), 5 (right), 9 instead of 6; the prompt's wrong successor 3 -> 8 does not count: 2 of 3."""
    rows = table([[8, 3, 4, 5], [3, 8, 5, 9]], [2, 3])
    result = evaluate(alphabet, rows, "causal_lm", [METRICS.parse("token_accuracy")], 2, 0, "cpu")
    assert result.metric == pytest.approx(2 / 3)


def test_exact_match_of_a_model_that_says_the_alphabet(alphabet):
    """Prompts end in b (4), d (6), b and e (7): the answers are «c d e», «e», «c d e» and the empty text."""
    texts = [[9, 9, 9, 9, 4, 5], [6, 7], [10, 4, 5], [8, 8, 7, 3]]
    answers = pa.array(["C d E.", "e", "c d", ""])
    rows = table(texts, [5, 1, 2, 3], answer=answers)
    decoding = Decoding(Letters(), 8, (2,))
    assert generate(alphabet, rows, decoding, 3, 0, "cpu") == ["c d e", "e", "c d e", ""]
    for size in (1, 3, 4):
        result = evaluate(alphabet, rows, "causal_lm", [METRICS.parse("exact_match")], size, 0, "cpu", decoding)
        assert (result.metric, result.num_examples) == (0.75, 4)


def test_rouge_l_compares_the_generated_text(alphabet):
    """«c d» of «c d e»: P = 1, R = 2/3, so 0.8; max_new_tokens cuts the generated text, not the reference."""
    rows = table([[3, 4, 5]], [2], answer=pa.array(["c d e"]))
    result = evaluate(
        alphabet, rows, "causal_lm", [METRICS.parse("rouge_l")], 1, 0, "cpu", Decoding(Letters(), 2, (2,))
    )
    assert result.metric == pytest.approx(0.8)


def test_an_empty_table_has_no_loss(bert, examples):
    result = evaluate(
        bert(3), examples("classification", 4).slice(0, 0), "classification", [METRICS.parse("accuracy")], 4, 0, "cpu"
    )
    assert isinstance(result, Evaluation)
    assert math.isnan(result.loss)
    assert math.isnan(result.metric)
    assert result.num_examples == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored_and_gradients_still_work(bert, examples, training):
    """Dropout of 0.9 would show if evaluation ran in training mode."""
    model, rows = bert(3).train(training), examples("classification", 5)
    model.dropout.p = 0.9
    first = evaluate(model, rows, "classification", [METRICS.parse("accuracy")], 5, 0, "cpu")
    assert first == evaluate(model, rows, "classification", [METRICS.parse("accuracy")], 5, 0, "cpu")
    assert model.training is training
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert model.classifier.weight.grad is not None


def test_the_training_mode_is_restored_after_an_error(bert, examples):
    model, rows = bert(3).train(), examples("classification", 2)
    beyond_vocabulary = rows.set_column(0, "input_ids", pa.array([[3, 4], [99, 5]], pa.list_(pa.int32())))
    with pytest.raises(IndexError):
        evaluate(model, beyond_vocabulary, "classification", [METRICS.parse("accuracy")], 2, 0, "cpu")
    assert model.training


def test_a_metric_of_generated_text_needs_a_tokenizer(llama, examples):
    with pytest.raises(ConfigError, match=r"'exact_match'.*tokenizer"):
        evaluate(llama, examples("causal_lm", 2), "causal_lm", [METRICS.parse("exact_match")], 2, 0, "cpu")


def test_a_metric_must_fit_the_task(llama, examples):
    with pytest.raises(ConfigError, match=r"'accuracy'.*'causal_lm'"):
        evaluate(llama, examples("causal_lm", 2), "causal_lm", [METRICS.parse("accuracy")], 2, 0, "cpu")
