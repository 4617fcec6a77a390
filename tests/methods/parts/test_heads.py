"""A random head that stays as it was drawn is the same draw whether or not the checkpoint has a head of its own."""

import logging

import numpy as np
import pytest

from tests.models.test_checkpoints import drawn

CLASSES = ("animals", "food", "music")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A classifier that was trained on the data's classes, and its base model alone."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = dict(enumerate(CLASSES))
    model = drawn("bert", "classification", vocab_size=300, id2label=names, label2id={n: i for i, n in names.items()})
    model.save_pretrained(folder / "classifier")
    model.bert.save_pretrained(folder / "base")
    return {name: {"path": str(folder / name), "tokenizer": "bytes"} for name in ("classifier", "base")}


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fedray.experiment.prepare"]


def test_the_checkpoints_own_head_is_replaced_and_said(start, checkpoints, caplog):
    classifier = drawn("bert", "classification", vocab_size=300)
    own = np.concatenate([p.detach().numpy().ravel() for p in classifier.classifier.parameters()])
    with caplog.at_level(logging.WARNING, logger="fedray"):
        kept = start("fedavg", model=checkpoints["classifier"])
        random = start("fedavg", model=checkpoints["classifier"], head="frozen_random")
    assert kept.prepared.data.label_names == CLASSES
    assert np.array_equal(kept.initial.head(), own)
    assert not np.isclose(random.initial.head(), own).any()
    (note,) = [message for message in told(caplog) if "frozen_random" in message]
    assert note.endswith("its own task head is not used by fedavg: head: frozen_random draws another one")


def test_it_is_the_draw_that_a_checkpoint_without_a_head_starts_with(start, checkpoints, caplog):
    """N(0, 0.02²) and a bias of 0; it stays so on every client, and another seed draws another one."""
    run = start("fedavg", model=checkpoints["classifier"], head="frozen_random")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fedray"):
        trained = start("fedavg", model=checkpoints["base"])
        frozen = start("fedavg", model=checkpoints["base"], head="frozen_random")
    assert not [message for message in told(caplog) if "frozen_random" in message]
    head = run.initial.head()
    for other in (trained, frozen):
        assert np.array_equal(head, other.initial.head())
    views = run.views("head", head)
    assert not views["classifier.bias.tensor"].any()
    assert 0.01 < views["classifier.weight.tensor"].std() < 0.03
    run.rounds(2)
    assert np.array_equal(run.adapter.read("head"), head)
    assert run.server.shared.head is None
    again = start("fedavg", model=checkpoints["classifier"], head="frozen_random", seed=4)
    assert not np.array_equal(again.initial.head(), head)
