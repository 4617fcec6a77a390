"""α(x) of every example in evaluation, against the model's own hidden states under a fixed weight."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fedray.adapters.adapter import Adapter
from fedray.adapters.context import ForwardContext
from fedray.adapters.lora import attach_lora
from fedray.config import LoraSection
from fedray.errors import ConfigError
from fedray.models.labels import labelled

Make = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]
SECTION = LoraSection(rank=2, alpha=4.0)


def attached(model: PreTrainedModel, seed: int = 0) -> Adapter:
    """An adapter whose branches and gate are random, and whose weights in training are 1 and 1."""
    adapter = attach_lora(model, SECTION, rest_rank=2, mixer="similarity")
    rng = np.random.default_rng(seed)
    for name in ("lora", "rest", "gate"):
        adapter.load(name, rng.normal(0, 0.5, adapter.layout(name).size).astype(np.float32))
    return adapter


def fixed(adapter: Adapter, model: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """The same two branches on another copy of the model, weighted by 1 − α and α."""
    twin = attach_lora(model, SECTION, rest_rank=2, mixer=1 - alpha)
    for name in ("lora", "rest"):
        twin.load(name, adapter.read(name))
    return twin.model


@contextmanager
def with_labels(labels: Tensor | None) -> Iterator[None]:
    if labels is None:
        yield
    else:
        with labelled(labels):
            yield


def alphas(adapter: Adapter, local: PreTrainedModel, batch: Batch, places: list[int]) -> list[float]:
    """v · h/‖h‖, h the last hidden state under the second branch alone at each example's place."""
    with torch.no_grad():
        states = local(**batch, output_hidden_states=True).hidden_states[-1]
    h = torch.stack([states[row, place] for row, place in enumerate(places)])
    return (functional.normalize(h, dim=-1) @ torch.from_numpy(adapter.read("gate"))).tolist()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_every_example_has_its_own_weight(make: Make, family: str, batch: Batch) -> None:
    """Of texts of 4, 7, 1 and 7 tokens the last ones count, and each example is computed as with its α fixed."""
    adapter = attached(make(family))
    found = adapter.model(**batch).logits
    weights = alphas(adapter, fixed(adapter, make(family), 1.0), batch, [3, 6, 0, 6])
    assert np.ptp(weights) > 0.1
    for row, weight in enumerate(weights):
        expected = fixed(adapter, make(family), weight)(**batch).logits[row]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_in_training_the_loaded_weights_count(make: Make, batch: Batch) -> None:
    adapter = attached(make("bert"))
    adapter.load("mixer", np.full(adapter.layout("mixer").size, 0.5, np.float32))
    adapter.model.train()
    expected = fixed(adapter, make("bert"), 0.5)(**batch).logits
    torch.testing.assert_close(adapter.model(**batch).logits, expected, atol=1e-6, rtol=0)


def test_a_gate_of_zero_is_the_first_branch_alone(make: Make, batch: Batch) -> None:
    adapter = attached(make("llama"))
    adapter.load("gate", np.zeros(16, np.float32))
    expected = fixed(adapter, make("llama"), 0.0)(**batch).logits
    torch.testing.assert_close(adapter.model(**batch).logits, expected, atol=1e-6, rtol=0)


def test_the_answer_has_no_part_in_the_weight(make: Make) -> None:
    """Prompts of 3 and 2 tokens, then answers; after the second answer comes a token without a loss. A conversation's
    last answer counts."""
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 3, 6, 5, 4, 3], [5, 6, 7, 8, 9, 3]])
    labels = torch.tensor([[-100, -100, -100, 6, 7, 8], [-100, -100, 6, 5, -100, -100], [-100, 6, -100, -100, 9, 3]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    adapter = attached(make("llama", causal=True))
    weights = alphas(adapter, fixed(adapter, make("llama", causal=True), 1.0), batch, [2, 1, 3])
    with with_labels(labels):
        found = adapter.model(**batch).logits
    for row, weight in enumerate(weights):
        expected = fixed(adapter, make("llama", causal=True), weight)(**batch).logits[row]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_generation_keeps_the_prompts_weight(make: Make, cached: bool) -> None:
    """Padded on the left; with a cache one token at a time, and without one the whole text anew."""
    tokens = torch.tensor([[3, 4, 5, 6], [0, 9, 7, 8]])
    batch = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    adapter = attached(make("llama", causal=True))
    adapter.load("gate", adapter.read("gate") * 3)
    options = {"max_new_tokens": 1 if not cached else 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = adapter.model.generate(**batch, **options, use_cache=cached)
    for row in range(2):
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        (weight,) = alphas(adapter, fixed(adapter, make("llama", causal=True), 1.0), own, [3])
        expected = fixed(adapter, make("llama", causal=True), weight).generate(**own, **options, use_cache=cached)
        assert torch.equal(found[row], expected[0])


def test_a_model_of_two_stacks_is_refused() -> None:
    config = AutoConfig.for_model("bart", d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50)
    config.encoder_attention_heads = config.decoder_attention_heads = 2
    with pytest.raises(ConfigError, match="an encoder-decoder model has two"):
        attach_lora(AutoModelForSequenceClassification.from_config(config), SECTION, rest_rank=2, mixer="similarity")


def test_weights_fit_what_a_layer_reads(make: Make) -> None:
    """One row per example, or per example and token; a layer with other rows is refused, not weighed wrongly."""
    model = make("bert")
    context = ForwardContext(model)
    assert context.alpha_for(torch.zeros(2, 3, 4)) is None
    context.enter(model, (), {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    assert context.batch is not None
    assert context.alpha_for(torch.zeros(2, 3, 4)) is None
    context.batch.alpha = torch.tensor([0.1, 0.2])
    for shape, expected in (
        ((2, 3, 4), [[[0.1]], [[0.2]]]),
        ((2, 4), [[0.1], [0.2]]),
        ((6, 4), [[0.1]] * 3 + [[0.2]] * 3),
    ):
        found = context.alpha_for(torch.zeros(shape))
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(expected))
    with pytest.raises(ConfigError, match=r"reads \(3, 2, 4\), not one row per example"):
        context.alpha_for(torch.zeros(3, 2, 4))
