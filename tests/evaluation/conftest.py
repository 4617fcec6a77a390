"""Tiny models with fixed weights, and tables of tokens drawn from a seed."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


@pytest.fixture
def bert():
    """bert(num_labels): a two-layer BERT; one label makes it a regression."""

    def build(num_labels: int) -> BertForSequenceClassification:
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            num_labels=num_labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.5,
            problem_type="regression" if num_labels == 1 else "single_label_classification",
        )
        return BertForSequenceClassification(config).eval()

    return build


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def examples():
    """examples(task, n): a table of n examples of 3 to 12 tokens; three classes."""

    def build(task: str, num_examples: int, seed: int = 0) -> pa.Table:
        rng = np.random.default_rng(seed)
        texts = [rng.integers(3, VOCABULARY, rng.integers(3, 13)).tolist() for _ in range(num_examples)]
        if task == "classification":
            labels = pa.array(rng.integers(0, 3, num_examples), pa.int32())
        elif task == "regression":
            labels = pa.array(rng.normal(size=num_examples), pa.float32())
        else:
            cuts = [int(rng.integers(1, len(text))) for text in texts]
            labels = pa.array(
                [[-100] * cut + text[cut:] for cut, text in zip(cuts, texts, strict=True)], pa.list_(pa.int32())
            )
        return pa.table({"input_ids": pa.array(texts, pa.list_(pa.int32())), "labels": labels})

    return build


@pytest.fixture
def lookup():
    """lookup(logits): a Llama whose next-token logits are `logits[last token]` ([vocabulary, vocabulary]).

    Embeddings are one-hot and attention and MLP add nothing, so the normalised hidden state is √vocabulary at the last
    token; the output layer divides by that.
    """

    def build(logits: torch.Tensor) -> LlamaForCausalLM:
        size = len(logits)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=size,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=4,
            max_position_embeddings=64,
            rms_norm_eps=1e-12,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0 if "norm" in name else 0.0)
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.lm_head.weight.copy_(logits.T / size**0.5)
        return model

    return build


@pytest.fixture
def alphabet(lookup):
    """Says the letter that follows, and ends after e (token 7)."""
    logits = torch.zeros(12, 12)
    for token in range(12):
        logits[token, 2 if token == 7 else (token + 1) % 12] = 5.0
    return lookup(logits)
