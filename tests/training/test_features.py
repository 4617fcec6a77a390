"""A client's features against the model's own hidden states, one unpadded example at a time."""

import numpy as np
import pytest
import torch

from fedray.data.shards import last_answer


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_they_are_the_last_hidden_states(adapt, trainer, examples, task):
    """Of the last token or, of a language model, of the last one before the answer; in the order of the rows."""
    adapter = adapt(task)
    local = trainer(adapter, task, num_examples=9)
    rows = [7, 0, 3, 3]
    found = local.features("train", rows)
    table = local._shard.tables["train"].to_pylist()
    adapter.model.eval()
    for state, row in zip(found, rows, strict=True):
        tokens = torch.tensor([table[row]["input_ids"]])
        place = last_answer(np.array(table[row]["labels"])) - 1 if task == "causal_lm" else -1
        with torch.no_grad():
            hidden = adapter.model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(state, hidden[0, place], atol=1e-5)
    assert np.array_equal(found[2], found[3])
    assert not np.allclose(found[0], found[1], atol=1e-2)
