"""Tiny models with real adapters, shards of random tokens, and a trainer over them."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from members import CLIENTS
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedray.adapters.lora import attach_lora
from fedray.config import EvaluationConfig, LoraSection, TrainConfig
from fedray.data.shards import Shard
from fedray.training.torch_engine import TorchEngine
from fedray.training.trainer import EngineBackend, LocalTrainer
from fedray.training.training_context import TrainingContext
from fedray.types import Client

VOCABULARY = 40


def tiny_bert(num_labels):
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            num_labels=num_labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
            problem_type="regression" if num_labels == 1 else "single_label_classification",
        )
    )


def tiny_llama():
    torch.manual_seed(2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def tiny_model(task):
    return tiny_llama() if task == "causal_lm" else tiny_bert(1 if task == "regression" else 3)


@pytest.fixture
def backbone():
    """backbone(task): a fresh tiny model with fixed weights."""
    return tiny_model


@pytest.fixture
def adapt():
    """adapt(task, dropout): a LoRA of rank 2 on a fresh tiny model; B is not zero, so that A has gradients at once."""

    def build(task="classification", dropout=0.0):
        adapter = attach_lora(tiny_model(task), LoraSection(rank=2, alpha=4.0, dropout=dropout), seed=5)
        adapter.load("lora", start(adapter))
        return adapter

    return build


def start(adapter):
    return np.random.default_rng(6).normal(0, 0.2, adapter.layout("lora").size).astype(np.float32)


@pytest.fixture
def restart():
    """restart(adapter, head): load the values that `adapt` gave, and the head as it was."""

    def load(adapter, head):
        adapter.load("lora", start(adapter))
        adapter.load("head", head)

    return load


def make_table(task, num_examples, seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, VOCABULARY, rng.integers(3, 13)).tolist() for _ in range(num_examples)]
    lists = pa.list_(pa.int32())
    if task == "classification":
        labels = pa.array(rng.integers(0, 3, num_examples), pa.int32())
    elif task == "regression":
        labels = pa.array(rng.normal(size=num_examples), pa.float32())
    else:
        cuts = [int(rng.integers(1, len(text))) for text in texts]
        labels = pa.array([[-100] * cut + text[cut:] for cut, text in zip(cuts, texts, strict=True)], lists)
    return pa.table({"input_ids": pa.array(texts, lists), "labels": labels})


@pytest.fixture
def examples():
    """examples(task, num_examples, seed): a table; texts of 3 to 12 tokens, three classes."""
    return make_table


@pytest.fixture
def trainer():
    """trainer(adapter, task, client, num_examples, server_round, seed, measure, rounds, **train): one client's
    round."""

    def build(
        adapter,
        task="classification",
        client="ann",
        num_examples=11,
        server_round=0,
        seed=3,
        measure=False,
        rounds=1,
        **train,
    ):
        number = sum(map(ord, client))
        tables = {
            "train": make_table(task, num_examples, number),
            "validation": make_table(task, 4, number + 1),
            "test": make_table(task, 6, number + 2),
        }
        training_context = TrainingContext(
            task=task,
            train=TrainConfig(**{"lr": 0.05, "batch_size": 4} | train),
            seed=seed,
            pad_token_id=0,
            evaluation=EvaluationConfig(batch_size=4),
            rounds=rounds,
        )
        identity = Client(id=client, index=0, num_examples=num_examples)
        work = EngineBackend(TorchEngine(adapter), training_context)
        return LocalTrainer(work, Shard(client, tables), identity, server_round, training_context, measure)

    return build


@pytest.fixture
def locals_of(trainer):
    """locals_of(adapter, task, clients, **train): every client's trainer, with its own number of examples."""

    def build(adapter, task="classification", clients=CLIENTS, **train):
        return {name: trainer(adapter, task, name, number, **train) for name, number in clients.items()}

    return build
