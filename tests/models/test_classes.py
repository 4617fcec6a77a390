"""The classes of a checkpoint's own head: their order is the data's, or the head is a new one."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, BertConfig

from fedray.config import Config, ModelConfig
from fedray.data.load import load_federated_data
from fedray.federation.initial import first_head
from fedray.models.architecture import architecture
from fedray.models.backbone import load_backbone, missing_head
from fedray.models.checkpoints.classes import class_order, own_classes, same_classes
from fedray.models.tokenizer import byte_tokenizer
from fedray.types import Task
from tests.models.test_checkpoints import BATCH, drawn

MNLI = ("contradiction", "neutral", "entailment")


def named(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def save(folder: Path, family: str = "bert", **fields: Any) -> ModelConfig:
    drawn(family, "classification", **fields).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What fedray logged; transformers has its own report on what it loads."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("fedray")]


def load(section: ModelConfig, cache: Path, names: tuple[str, ...], task: Task = "classification") -> Any:
    arch = architecture(section, task, len(names), None, 0, names)
    return load_backbone(section, arch, task, seed=0, device="cpu", cache_dir=cache)


@pytest.mark.parametrize(
    ("own", "names", "order"),
    [
        (MNLI, ("contradiction", "entailment", "neutral"), MNLI),
        (MNLI, ("Contradiction", "ENTAILMENT", " neutral"), ("Contradiction", " neutral", "ENTAILMENT")),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), ("0", "1", "2")),
        (("2", "0", "1"), ("0", "1", "2"), ("2", "0", "1")),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("1", "2", "3"), None),
        (("LABEL_0", "LABEL_1", "LABEL_2"), MNLI, None),
        (MNLI, ("neutral", "entailment"), None),
        (("a", "A", "b"), ("a", "b", "c"), None),
        (("a", "b", "c"), ("a", "A", "b"), None),
    ],
)
def test_the_order_is_the_heads_where_the_names_match(
    tmp_path: Path, own: tuple[str, ...], names: tuple[str, ...], order: tuple[str, ...] | None
) -> None:
    section = save(tmp_path / "model", **named(own))
    assert class_order(section, names) == (order or names)
    assert same_classes(own, names) == (order is not None)


@given(st.permutations(["joy", "anger", "0", "Fear"]), st.permutations(["JOY", "anger", "0", "fear"]))
def test_every_output_keeps_its_name(own: list[str], names: list[str]) -> None:
    config = BertConfig(**named(tuple(own)))
    assert own_classes(config) == tuple(own)
    assert same_classes(own, names)


def test_label2id_decides(tmp_path: Path) -> None:
    """Where the two mappings contradict each other; `label2id` is what the training script used."""
    section = save(tmp_path / "model", **named(MNLI))
    file = tmp_path / "model" / "config.json"
    changed = json.loads(file.read_text()) | {"label2id": {"entailment": 0, "neutral": 1, "contradiction": 2}}
    file.write_text(json.dumps(changed))
    assert class_order(section, sorted(MNLI)) == ("entailment", "neutral", "contradiction")


def test_the_data_follow_the_head(tmp_path: Path) -> None:
    """The indices of the labels are the outputs of the trained head, so that its answers count as they were meant."""
    save(tmp_path / "model", **named(MNLI))
    rows = [{"text": f"text {i}", "label": sorted(MNLI)[i % 3]} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "rounds": 1,
            "method": "fedavg",
            "model": {"path": str(tmp_path / "model"), "tokenizer": "bytes"},
            "data": {
                "source": "files",
                "files": {"train": str(tmp_path / "train.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "clients": {"count": 1},
        }
    )
    data = load_federated_data(config, byte_tokenizer())
    assert data.label_names == MNLI
    table = data.shards["client_000"].tables["train"]
    counted = dict(zip(*np.unique(table["labels"].to_numpy(), return_counts=True), strict=True))
    assert set(counted) <= {0, 1, 2}
    arch = architecture(config.model, "classification", 3, None, None, data.label_names)
    assert arch.id2label == dict(enumerate(MNLI))
    assert arch.label2id == {name: index for index, name in enumerate(MNLI)}
    texts = {byte_tokenizer()(row["text"]).input_ids[5]: row["label"] for row in rows[:10]}  # by the digit
    for tokens, label in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True):
        if len(tokens) == 8:  # <bos>, "text 7", <eos>
            assert MNLI[label] == rows[int(chr(tokens[6]))]["label"], texts


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_head_for_other_classes_is_drawn_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str) -> None:
    """Of RoBERTa's head the part that does not depend on the classes stays, as it does for another number of them."""
    section = save(tmp_path / "model", family, **named(MNLI))
    trained = AutoModelForSequenceClassification.from_pretrained(section.path).eval()
    with caplog.at_level(logging.WARNING, logger="fedray"):
        fitting = load(section, tmp_path / "cache", MNLI)
    assert said(caplog) == []
    assert missing_head(fitting) == ()
    assert torch.equal(fitting(**BATCH).logits, trained(**BATCH).logits)
    new = {}
    for names in (("bad", "good", "mixed"), ("bad", "good")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fedray"):
            model = load(section, tmp_path / "cache", names)
        told = f"trained on the classes {', '.join(MNLI)}; the data's classes are {', '.join(names)}; a new head is"
        assert told in caplog.text
        new[len(names)] = set(missing_head(model))
        head = first_head(model, seed=0)
        assert head is not None
        own = first_head(fitting, seed=0)
        assert own is not None
        assert len(head) != len(own) or not np.allclose(head, own)
    expected = {
        "bert": {"classifier.weight", "classifier.bias"},
        "roberta": {"classifier.out_proj.weight", "classifier.out_proj.bias"},
        "llama": {"score.weight"},
    }[family]
    assert new == {3: expected, 2: expected}


def test_a_base_model_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn("bert", "classification").bert.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="fedray"):
        model = load(ModelConfig(path=str(tmp_path / "model")), tmp_path / "cache", ("bad", "good"))
    assert said(caplog) == []
    assert set(missing_head(model)) == {"classifier.weight", "classifier.bias"}


def test_numbers_and_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A head that was trained on numbers keeps them, and serves no classes; one for classes gives no number."""
    numbers = save(tmp_path / "numbers", num_labels=1, problem_type="regression")
    two = save(tmp_path / "two", num_labels=2, problem_type="regression")
    classes = save(tmp_path / "classes", **named(MNLI))
    with caplog.at_level(logging.WARNING, logger="fedray"):
        assert missing_head(load(numbers, tmp_path / "cache", (), "regression")) == ()
    assert said(caplog) == []
    for section, names, task, told in (
        (numbers, ("0", "1"), "classification", "trained on 1 numbers or independent labels"),
        (two, ("0", "1"), "classification", "trained on 2 numbers or independent labels"),
        (classes, (), "regression", "trained on the classes contradiction, neutral, entailment, and the task is regre"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fedray"):
            model = load(section, tmp_path / "cache", names, task)  # type: ignore[arg-type]
        assert told in caplog.text
        assert set(missing_head(model)) == {"classifier.weight", "classifier.bias"}


def test_one_file_of_a_node_serves_data_with_other_names(tmp_path: Path) -> None:
    """Names of classes change no weights."""
    drawn("bert", "classification").bert.save_pretrained(tmp_path / "model")
    for names in (("bad", "good"), ("ham", "spam")):
        load(ModelConfig(path=str(tmp_path / "model")), tmp_path / "cache", names)
    assert len(list((tmp_path / "cache" / "backbones").glob("*.safetensors"))) == 1
