"""Losses against transformers' own, and what they cost."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.testing import assert_close

from fedray.data.batches import batches
from fedray.evaluation.losses import num_units, prompts, score
from fedray.models.labels import current_labels


def whole_batch(table):
    (batch,) = batches(table, table.num_rows, 0, None, "cpu")
    return batch


@pytest.mark.parametrize(("task", "num_labels"), [("classification", 3), ("regression", 1)])
def test_the_mean_is_the_loss_of_bert(bert, examples, task, num_labels):
    model, batch = bert(num_labels), whole_batch(examples(task, 7))
    scored = score(model, batch, task)
    assert scored.losses.shape == (7,)
    assert_close(scored.losses.mean(), model(**batch).loss, rtol=1e-6, atol=0)


def test_regression_of_a_single_example_keeps_its_shape(bert, examples):
    scored = score(bert(1), whole_batch(examples("regression", 1)), "regression")
    assert scored.losses.shape == scored.outputs.shape == scored.labels.shape == (1,)


def test_the_mean_and_its_gradient_are_those_of_llama(llama, examples):
    batch = whole_batch(examples("causal_lm", 6))
    parameters = list(llama.parameters())
    theirs = llama(**batch).loss
    ours = score(llama, batch, "causal_lm").losses.mean()
    assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), rtol=1e-4, atol=1e-6)


def test_only_answer_tokens_reach_the_output_layer(llama, examples):
    table = examples("causal_lm", 6)
    seen = []
    llama.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    score(llama, whole_batch(table), "causal_lm")
    assert seen == [(1, num_units(table, "causal_lm").sum(), 40)]


def test_the_model_is_left_without_hooks(llama, examples):
    batch = whole_batch(examples("causal_lm", 4))
    before = llama(**batch).logits
    score(llama, batch, "causal_lm")
    assert torch.equal(llama(**batch).logits, before)
    assert llama(**batch).loss is not None


def test_hooks_of_an_adapter_see_the_labels(llama, examples):
    batch, seen = whole_batch(examples("causal_lm", 4)), []
    llama.register_forward_pre_hook(lambda *_: seen.append(current_labels()))
    score(llama, batch, "causal_lm")
    assert torch.equal(seen[0], batch["labels"])


def test_bfloat16_logits_are_scored_in_float32(bert, examples):
    scored = score(bert(3).bfloat16(), whole_batch(examples("classification", 3)), "classification")
    assert scored.losses.dtype == scored.outputs.dtype == torch.float32


LABELS = [[-100, -100, 5, 6], [7, 8], [9], [-100, -100, -100], [-100, 4, -100, 3]]


def labelled() -> pa.Table:
    """Two chunks, so that offsets do not start at zero."""
    rows = pa.table(
        {
            "input_ids": pa.array([[11, 12, 5, 6], [7, 8], [9], [21, 22, 23], [31, 4, 33, 3]], pa.list_(pa.int32())),
            "labels": pa.array(LABELS, pa.list_(pa.int32())),
        }
    )
    return pa.concat_tables([rows.slice(0, 2), rows.slice(2, 3)])


def test_units_are_predicted_answer_tokens():
    """A text's first token has no predecessor that could predict it: rows 2 and 3 lose one label each."""
    assert num_units(labelled(), "causal_lm").tolist() == [2, 1, 0, 0, 2]
    assert num_units(labelled().slice(1, 4), "causal_lm").tolist() == [1, 0, 0, 2]
    assert num_units(labelled(), "classification").tolist() == [1] * 5


def test_units_of_an_empty_table():
    assert num_units(labelled().slice(0, 0), "causal_lm").shape == (0,)


def test_prompts_end_before_the_last_answer():
    """The last row has two, as conversations do: generation is compared with the last."""
    cut = prompts(labelled())
    assert [tokens.tolist() for tokens in cut] == [[11, 12], [7], [9], [21, 22, 23], [31, 4, 33]]
    assert all(tokens.dtype == np.int32 for tokens in cut)
