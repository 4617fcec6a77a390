"""Clients that train on a quantised base model: as on the dequantised one, and together as one by one."""

import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from agreement import agree, distance, of_workers, together
from tiny import tiny_bert

from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.experiment.prepare import check_precision, prepare
from fedray.models.quantised import QuantisedLinear, dequantise_layers

pytest.importorskip("bitsandbytes", reason="needs the extra quantised")

IDS = ("client_000", "client_001", "client_002")


def small(precision: str, **more: Any) -> dict[str, Any]:
    return {"small": {"share": 1, "precision": precision, **more}}


def quantised(model: Any) -> int:
    return sum(isinstance(module, QuantisedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("adapter", "precision", "dtype"),
    [
        ("lora", "nf4", "float32"),
        ("lora", "int8", "float32"),
        ("reft", "nf4", "float32"),
        ("lora", "nf4", "bfloat16"),
        ("reft", "int8", "bfloat16"),
    ],
)
def test_losses_and_adapters_are_those_on_the_dequantised_base(start, adapter, precision, dtype):
    """The same matrices take part in the same products, so that losses agree to the sum of rounding of one pass, and
    an adapter after one step to that of its gradient: about 1e-7 of a value in float32. In bfloat16, 2^-8 a product,
    AdamW's first step is the sign of every gradient, so that a value near zero may move the other way; the loss, a mean
    over examples, has no such jumps. The base without quantisation gives another loss."""
    method = {"name": "fedavg", "adapter": adapter}
    run = start(method, clients__tiers=small(precision), model__dtype=dtype, train__max_steps=1)
    (task,) = run.tasks(IDS[:1])
    assert quantised(run.adapter.model) == 2 * 6 + 1
    found = run.worker.train(task)
    assert dequantise_layers(run.adapter.model) == precision
    assert quantised(run.adapter.model) == 0
    wanted = run.worker.train(task)
    exact = dtype == "float32"
    assert found.report.train_loss == pytest.approx(wanted.report.train_loss, rel=1e-6 if exact else 2.0**-8)
    if exact:
        assert distance(found.adapter, wanted.adapter) < 1e-5
    plain = start(method, model__dtype=dtype, train__max_steps=1)
    other = plain.worker.train(*plain.tasks(IDS[:1]))
    assert other.report.train_loss != pytest.approx(wanted.report.train_loss, rel=1e-5)
    assert other.report.train_loss == pytest.approx(wanted.report.train_loss, rel=0.2)


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ({"name": "fedavg"}, "int8"),
        ({"name": "fedalt", "mixer": "adaptive"}, "nf4"),
        ({"name": "fedhft", "timing": "post", "importance": "energy"}, "int8"),
        ({"name": "fedlease", "warmup_rounds": 1}, "nf4"),
        ({"name": "fedreft", "mixing": "adaptive"}, "nf4"),
    ],
    ids=str,
)
def test_together_is_as_one_by_one(start, method, precision, caplog):
    """No client's activations decide how another one's are rounded."""
    run = start(method, clients__tiers=small(precision), train__batch_size=2, train__epochs=2)
    for _ in range(2):
        tasks = run.tasks(IDS, measure=True)
        alone = [run.worker.train(task) for task in tasks]
        agree(together(run.worker, tasks), alone)
        run.round()
    assert quantised(run.adapter.model) == 2 * 6 + 1
    assert not of_workers(caplog)  # nothing fell back


def test_the_head_is_that_of_the_other_tiers(start):
    """It is not quantised, and is drawn or read in the common precision."""
    one, other = (start("fedavg", clients__tiers=small(precision)) for precision in ("nf4", "float32"))
    assert (one.initial.vectors["head"] == other.initial.vectors["head"]).all()
    assert one.initial.vectors["head"].any()


def configuration(tiers: dict[str, Any], **more: Any) -> Any:
    base = {
        "rounds": 1,
        "task": "classification",
        "method": "fedavg",
        "model": tiny_bert(),
        "data": {"source": "synthetic"},
        "runtime": "inline",
        "device": "cpu",
    }
    return load_config({**base, "clients": {"count": 2, "tiers": tiers}, **more})


def test_deepspeed_is_refused():
    with pytest.raises(ConfigError, match="precision: nf4 needs engine: torch, got deepspeed"):
        configuration(small("nf4", engine="deepspeed", offload={"optimizer": "cpu"}))


def test_a_type_of_what_is_not_quantised_is_no_quantisation():
    with pytest.raises(ConfigError, match=r"model.dtype: got 'nf4'"):
        configuration({}, model={**tiny_bert(), "dtype": "nf4"})


def test_float16_needs_a_gpu_below_quantised_layers_too():
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        check_precision(configuration(small("nf4"), model={**tiny_bert(), "dtype": "float16"}))


def test_a_base_that_trains_cannot_be_quantised():
    with pytest.raises(ConfigError, match="the whole model would train in int8, which cannot train; use float32"):
        prepare(configuration(small("int8"), method={"name": "fedavg", "adapter": "full"}))


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed: pip install 'fedray\[quantised\]'"):
        check_precision(configuration(small("nf4")))


def test_checkpointed_activations_and_copies(start):
    """Recomputed passes dequantise again; a copied model computes the same."""
    run, other = (
        start("fedavg", clients__tiers=small("nf4", activation_checkpointing=checkpoints), train__max_steps=1)
        for checkpoints in (False, True)
    )
    found, wanted = (each.worker.train(*each.tasks(IDS[:1])) for each in (run, other))
    assert distance(found.adapter, wanted.adapter) < 1e-6
    model, tokens = run.adapter.model.eval(), torch.tensor([[5, 9, 7, 8]])
    assert torch.equal(deepcopy(model)(input_ids=tokens).logits, model(input_ids=tokens).logits)
