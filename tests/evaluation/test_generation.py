"""Texts that a model generates: where they begin and end, and that they depend on no batch.

What decides a token is compared with transformers' own `generate` on one prompt at a time.
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from letters import Letters, table
from transformers import AutoConfig, AutoModelForCausalLM

from fedray.config import GenerationSection
from fedray.evaluation.generation import Decoding, generate

OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "long beams": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "all beams": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
    "penalty": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "everything": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95}
FAMILIES = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
    "gpt2": {"n_head": 2, "tie_word_embeddings": False},
    "opt": {"ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"n_head": 2},
    "gpt_neox": {"num_attention_heads": 2, "intermediate_size": 32},
    "mamba": {"state_size": 4},
}


def tiny(family):
    """A model of the family whose texts are varied, in float64: rounding decides no token. Bloom's attention is in
    float32, where padding of float64 is infinite."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, **FAMILIES[family], bos_token_id=1, eos_token_id=2)
    config.initializer_range = 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
    return model if family == "bloom" else model.double()


def alone(model, rows, options):
    """What transformers generates for each prompt alone."""
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": [2, 7], **options}
    found = []
    for tokens in rows["input_ids"].to_pylist():
        prompt = torch.tensor([tokens[:-1]])
        (answer,) = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        answer = answer[prompt.shape[1] :].tolist()
        end = next((i for i, token in enumerate(answer) if token in (2, 7)), len(answer))
        found.append(Letters().decode(answer[:end], skip_special_tokens=True))
    return found


@pytest.fixture
def prompted():
    """Eight prompts of 1 to 11 tokens, each with an answer of one token."""
    rng = np.random.default_rng(4)
    texts = [rng.integers(3, 40, size + 1).tolist() for size in (5, 1, 11, 2, 7, 3, 3, 9)]
    return table(texts, [len(text) - 1 for text in texts])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_are_as_transformers_alone(family, options, prompted):
    """Several end tokens, and padding by the end token, which repetition penalties must not count."""
    model = tiny(family)
    expected = alone(model, prompted, options)
    assert len(set(expected)) > 4
    decoding = Decoding(Letters(), 9, (2, 7), GenerationSection(**options))
    for size, pad in ((1, 0), (3, 2), (8, 7)):
        assert generate(model, prompted, decoding, size, pad, "cpu") == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_penalties_change_the_text(options, prompted):
    """Otherwise the comparison with transformers would show nothing."""
    model = tiny("llama")
    plain = alone(model, prompted, options)
    for changed in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"num_beams": 5, "length_penalty": 3.0}):
        assert plain != alone(model, prompted, {**options, **changed})


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_sampled_texts_depend_on_the_example_alone(family, prompted):
    """Not on the batch size, the order of evaluations, nor torch's generator; but on seed, key and row."""
    model, options = tiny(family), GenerationSection(**SAMPLED)

    def texts(size, seed=5, key=(0, "ann", "test"), rows=prompted):
        return generate(model, rows, Decoding(Letters(), 9, (2,), options, seed), size, 0, "cpu", key)

    torch.manual_seed(0)
    expected = texts(1)
    for size in (3, 8):
        torch.manual_seed(size)
        assert texts(size) == expected
    assert texts(8, rows=prompted.slice(0, 3)) == expected[:3]
    for others in (texts(8, seed=6), texts(8, key=(1, "ann", "test")), texts(8, key=(0, "ann", "aggregated"))):
        assert sum(one != other for one, other in zip(others, expected, strict=True)) > 4
    same_prompts = prompted.take([2] * 8)
    assert len(set(texts(8, rows=same_prompts))) == 8


def test_sampling_draws_by_probability(lookup):
    """After token 3: a (3) with 0.5, b (4) with 0.25, c (5) with 0.15 and d (6) with 0.1. At temperature 1/2 they are
    squared: 0.25, 0.0625, 0.0225 and 0.01 of 0.345; top_p 0.7 leaves a and b, in the ratio 2 : 1; so does top_k 2."""
    logits = torch.full((12, 12), -50.0)
    logits[:, 3:7] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    model, rows = lookup(logits), table([[3, 3]] * 4000, [1] * 4000)

    def shares(**options):
        decoding = Decoding(Letters(), 1, (2,), GenerationSection(do_sample=True, **options))
        counts = Counter(generate(model, rows, decoding, 1000, 0, "cpu"))
        return [counts[letter] / 4000 for letter in "abcd"]

    close = {"abs": 4 * np.sqrt(0.25 / 4000)}  # four standard errors
    assert shares() == pytest.approx([0.5, 0.25, 0.15, 0.1], **close)
    assert shares(temperature=0.5) == pytest.approx(np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345, **close)
    for cut in ({"top_p": 0.7}, {"top_k": 2}):
        found = shares(**cut)
        assert found == pytest.approx([2 / 3, 1 / 3, 0, 0], **close)
        assert found[2:] == [0, 0]


def test_a_stop_string_ends_the_text_before_it(alphabet):
    """After b: «c d e f», e and f being letters as others here. Letters and spaces of several tokens make a stop."""
    rows = table([[4, 3], [6, 3]], [1, 1])

    def texts(*stops, **options):
        chosen = GenerationSection(stop_strings=stops, **options)
        return generate(alphabet, rows, Decoding(Letters(), 6, (2,), chosen), 2, 0, "cpu")

    assert texts() == ["c d e", "e"]
    assert texts("d e") == ["c ", "e"]
    assert texts("e", "d") == ["c ", ""]
    assert texts("x") == ["c d e", "e"]
    assert texts("d", num_beams=2) == ["c ", "e"]
    assert texts("d", do_sample=True, top_k=1) == ["c ", "e"]


def test_generation_stops_at_a_stop_string(alphabet):
    """A row that has not stopped goes on; all have after the third token of ten."""
    rows, calls = table([[3, 3], [4, 3]], [1, 1]), []
    alphabet.register_forward_hook(lambda *_: calls.append(1))
    options = GenerationSection(stop_strings=("c", "e"))
    assert generate(alphabet, rows, Decoding(Letters(), 10, (), options), 2, 0, "cpu") == ["b ", ""]
    assert len(calls) == 2


def test_stop_strings_of_beams_without_end_tokens(prompted):
    """Texts of unequal length, which transformers fills up; one by one they end at the same places."""
    model = tiny("llama")
    options = GenerationSection(num_beams=3, stop_strings=("p", "q", "r", "s"))
    decoding = Decoding(Letters(), 9, (), options)
    one_by_one = generate(model, prompted, decoding, 1, 0, "cpu")
    assert generate(model, prompted, decoding, 8, 0, "cpu") == one_by_one
    assert len({len(text) for text in one_by_one}) > 2
    assert not any(letter in text for text in one_by_one for letter in "pqrs")


def test_generation_ends_at_any_of_the_tokens_that_end_an_answer(alphabet):
    """After d (6) comes e (7), which ends the turn here and is no part of the text."""
    rows = table([[3, 4, 5]], [2], answer=pa.array([""]))
    assert generate(alphabet, rows, Decoding(Letters(), 8, (2, 7)), 1, 0, "cpu") == ["c d"]
    assert generate(alphabet, rows, Decoding(Letters(), 5), 1, 0, "cpu") == ["c d e a"]  # token 2 is no letter


def test_generation_continues_from_the_last_answer(alphabet):
    """Labels of a conversation: b (4) and d (6) are answers; generation continues what comes before d, a c (5)."""
    lists = pa.list_(pa.int32())
    labels = pa.array([[-100, 4, -100, 6]], lists)
    rows = pa.table({"input_ids": pa.array([[3, 4, 5, 6]], lists), "labels": labels, "answer": ["d e"]})
    assert generate(alphabet, rows, Decoding(Letters(), 8, (2,)), 1, 0, "cpu") == ["d e"]


def test_generation_is_greedy_whatever_the_model_prefers(lookup):
    """Sampling at temperature 100 would draw any of the tokens, and a penalty of 50 on the prompt's tokens (b, c, d, e)
    would turn to the runner-up h (10)."""
    logits = torch.zeros(12, 12)
    logits[:, 10] = 1.0
    for token, following in [(3, 4), (4, 5), (5, 6), (6, 7), (7, 2)]:
        logits[token, following] = 5.0
    model = lookup(logits)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 100.0
    model.generation_config.repetition_penalty = 50.0
    rows = table([[4, 5, 6, 7, 3, 4]], [5], answer=pa.array([""]))
    assert generate(model, rows, Decoding(Letters(), 8, (2,)), 1, 0, "cpu") == ["b c d e"]
