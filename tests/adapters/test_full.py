"""The whole model as an adapter."""

import numpy as np
import pytest
import torch

from fedray.adapters.full import attach_full


@pytest.mark.parametrize("causal", [False, True])
def test_every_parameter_is_in_it_once(make, family, causal):
    model = make(family, causal=causal)
    adapter = attach_full(model)
    assert adapter.num_trainable() == sum(parameter.numel() for parameter in model.parameters())
    assert ("head" in adapter.names) == (not causal)
    stored = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for slot, view in adapter.layout("full").items(adapter.read("full")):
        assert np.array_equal(view, stored[slot.module].numpy())


def test_what_is_read_comes_back_bit_for_bit(make):
    model = make("bert")
    adapter = attach_full(model)
    values = adapter.read("full")
    adapter.load("full", values + 1)
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, torch.from_numpy(values[:1]))
    adapter.load("full", values)
    assert np.array_equal(adapter.read("full"), values)
