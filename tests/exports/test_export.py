"""What is exported computes what fedray computes: every method's models, opened by what their cards say, with the code
that the cards print. A float32 LoRA has the same bits; what stands for several branches agrees up to rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from every_method import entry
from opened import batch, logits, opened_logits
from safetensors.torch import load_file
from tiny import TINY_LLAMA, tiny_bert

import fedray
from fedray.config import load_config, parse_yaml
from fedray.errors import ConfigError
from fedray.experiment.restore import restore
from fedray.exports.export import export, export_restored, origin_of
from fedray.methods.registry import METHODS
from fedray.planning.catalogue import method_facts
from fedray.results.method_tables import OPENERS
from fedray.results.run_result import RunResult

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}
CLIENT = "client_001"

LLAMA = {**TINY_LLAMA, "initializer_range": 0.3, "pad_token_id": 256}

MORE = [
    {"name": "fedavg", "label": "fedavg-reft", "adapter": "reft"},
    {"name": "fedavg", "label": "fedavg-full", "adapter": "full"},
    {"name": "fedavg", "label": "fedavg-core", "adapter": "core"},
    {"name": "fedavg", "label": "fedavg-random", "head": "frozen_random"},
    {"name": "fedavg", "label": "fedavg-third", "lora": {"alpha": 3.0}},
    {"name": "fedavg", "label": "fedavg-masked", "mask": "energy"},
    {"name": "fedavg", "label": "noreft", "adapter": "reft", "reft": {"kind": "noreft"}},
    {"name": "fedavg", "label": "direft", "adapter": "reft", "reft": {"kind": "direft", "rotation": "relative"}},
    {"name": "fedalt", "label": "fedalt-fixed", "mixer": "fixed", "alpha": 0.3},
    {"name": "fedalt", "label": "fedalt-reft", "adapter": "reft"},
    {"name": "fedhft", "label": "fedhft-pre", "timing": "pre"},
    {"name": "fedtreelora", "label": "tree", "warmup_rounds": 1, "clusters": 2},
    {"name": "fedlease", "label": "lease", "warmup_rounds": 1},
]
"""Entries of `method` whose models have another form than those of the method's defaults."""


def experiment(methods, **fields):
    """Return a run of three clients, one of them with fewer rows and components, with a decoder of one block."""
    return {
        "name": "home",
        "runtime": "inline",
        "device": "cpu",
        "rounds": 1,
        "seed": 3,
        "method": methods,
        "model": {"path": "random", "tokenizer": "bytes", "config": LLAMA},
        "data": {"source": "synthetic", "classes": 3, "examples_per_client": 8, "max_length": 12},
        "partition": {"kind": "by_file"},
        "clients": {
            "count": 3,
            "tiers": {
                "strong": {"clients": ["client_000", "client_002"]},
                "weak": {"clients": [CLIENT], "mask_ratio": 0.5, "lora_rank": 2},
            },
        },
        "lora": {"rank": 4, "alpha": 16},
        "reft": {"rank": 2},
        "train": {"lr": 2e-2, "max_steps": 1, "batch_size": 4},
        "evaluation": {"every": 0},
        **fields,
    }


def check(run, method, client, folder, monkeypatch, merge=False):
    """Export a model, open it, and compare its logits with fedray's; return the export."""
    restored = restore(run, method, client, device="cpu")
    ours = logits(restored.model, batch())
    done = export_restored(restored, folder, origin_of(RunResult.load(run), restored, folder, merge), merge)
    theirs = opened_logits(folder, done.opener, monkeypatch)
    if "In float32 the logits equal fedray's bit for bit." in done.notes:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(theirs, ours, **ROUNDING)
    return done


@pytest.fixture(scope="module", autouse=True)
def without_predictions():
    """No run here predicts its memory, which takes most of the time of so small a run."""

    def predict(*_):
        raise ConfigError("not asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedray.experiment.prepare.predict", predict)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Every method with its defaults, and `MORE`."""
    folder = tmp_path_factory.mktemp("export") / "run"
    fedray.run(experiment([*(entry(name) for name in METHODS.names), *MORE]), output=folder)
    return folder


LABELS = [*METHODS.names, *(more["label"] for more in MORE)]


@pytest.mark.parametrize("method", LABELS)
def test_a_client_s_model_is_opened_elsewhere(run, method, tmp_path, monkeypatch):
    done = check(run, method, CLIENT, tmp_path / "out", monkeypatch)
    if method in METHODS.names and method != "fed_plora":  # a weak client's components of it are a second branch
        assert done.opener == OPENERS[method_facts(method).export].partition(",")[0]


SERVERS = ["fed_plora", "flora", "fedavg-core", "fedavg-reft", "fedavg-full", "fedavg-random"]


@pytest.mark.parametrize("method", SERVERS)
def test_the_server_s_model_is_opened_elsewhere(run, method, tmp_path, monkeypatch):
    check(run, method, None, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("method", ["fedavg", "fedhft", "fedalt-fixed", "tree", "fedavg-core", "fedavg-full"])
def test_merged_weights_are_opened_by_transformers(run, method, tmp_path, monkeypatch):
    assert check(run, method, CLIENT, tmp_path / "out", monkeypatch, merge=True).opener == "transformers"


def test_a_whole_model_in_mixed_precision_is_exported_in_float32(tmp_path, monkeypatch):
    """Beside a client in float32: only the other's logits are those of torch's autocast."""
    tiers = {"strong": {"share": 0.5}, "weak": {"share": 0.5, "precision": "bfloat16"}}
    method = {"name": "fedavg", "adapter": "full"}
    data = {"source": "synthetic", "examples_per_client": 12, "max_length": 48}
    fields = {"task": "causal_lm", "data": data, "clients": {"count": 2, "tiers": tiers}}
    run = fedray.run(experiment(method, **fields), output=tmp_path / "run")
    table = run.clients().drop_duplicates("client").set_index("client")
    for client, tier in table["tier"].items():
        restored = restore(tmp_path / "run", "fedavg", client, device="cpu")
        ours = logits(restored.model, batch())
        done = export_restored(restored, tmp_path / tier, origin_of(run, restored, tmp_path / tier, False), False)
        assert any("torch.autocast(device, torch.bfloat16)" in note for note in done.notes) == (tier == "weak")
        with torch.autocast("cpu", torch.bfloat16, enabled=tier == "weak"):
            theirs = opened_logits(tmp_path / tier, done.opener, monkeypatch)
        torch.testing.assert_close(theirs.float(), ours.float(), **ROUNDING)
        weights = load_file(tmp_path / tier / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert any((tensor.bfloat16().float() != tensor).any() for tensor in weights.values())


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3, "pad_token_id": 256}


def test_a_quantised_base_is_exported_dequantised(tmp_path, monkeypatch):
    """Adapter and merged weights stand on the rounded weights, those of GPT-2's transposed layers too: the logits are
    fedray's. The card says what was rounded."""
    pytest.importorskip("bitsandbytes", reason="needs the extra quantised")
    tiers = {"small": {"share": 1, "precision": "nf4"}}
    model = {"path": "random", "tokenizer": "bytes", "config": GPT2}
    methods = ["fedavg", {"name": "fedavg", "label": "fedavg-reft", "adapter": "reft"}]
    fedray.run(experiment(methods, model=model, clients={"count": 3, "tiers": tiers}), output=tmp_path / "run")
    for name, method, merge in (("a", "fedavg", False), ("b", "fedavg", True), ("c", "fedavg-reft", False)):
        done = check(tmp_path / "run", method, CLIENT, tmp_path / name, monkeypatch, merge)
        assert done.opener == {"a": "peft", "b": "transformers", "c": "pyreft"}[name]
        assert "bitsandbytes rounded to nf4. The weights in this folder are the rounded ones." in done.notes[0]
        base = tmp_path / name / ("" if merge else "base") / "config.json"
        assert "nf4" not in base.read_text()


@pytest.mark.parametrize(("method", "reason"), [("fedreft", "edit some tokens"), ("fedalt", "anew for every input")])
def test_what_no_weights_can_express_is_not_merged(run, method, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        export(run, method, CLIENT, to=tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_server_without_a_model_of_its_own_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="name a client"):
        export(run, "fedalt", None, to=tmp_path / "out")


def test_a_folder_that_is_not_empty_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        export(run, "fedavg", CLIENT, to=tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        export(run, "fedavg", CLIENT, to=tmp_path / "file" / "out")


def test_the_card_says_how_the_model_was_made(run, tmp_path):
    export(run, "fedavg-third", CLIENT, to=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"fedray export RUN --client {CLIENT} --method fedavg-third --to out" in card
    assert "| rounds | 1 |" in card
    assert "# license:" in card
    again = load_config(parse_yaml(card.split("```yaml\n")[1].split("```")[0], "card"))
    given = load_config(run / "config.yaml")
    only = tuple(found for found in given.method if found.key == "fedavg-third")
    assert again == given.model_copy(update={"method": only})


def test_the_folded_lora_has_the_needed_rank(run, tmp_path):
    """FedEx-LoRA's carried sum has (K − 1) r columns per round, of at most 64; the rest of its branch is empty."""
    export(run, "fedex_lora", None, to=tmp_path / "out")
    rank = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))["r"]
    assert 4 < rank <= 4 + 2 * 4


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3, "pad_token_id": 256}

OTHERS = {
    "bert": ({}, {"model": tiny_bert(initializer_range=0.3)}),
    "pooled": ({}, {"model": {**tiny_bert(initializer_range=0.3), "pooling": "mean"}}),
    "language": ({}, {"task": "causal_lm"}),
    "regression": ({}, {"task": "regression"}),
    "gpt2": (GPT2, {"task": "causal_lm"}),
}
"""Other models and tasks: the fields of the model's configuration and of the experiment."""

QUICK = ("bert", "pooled")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in OTHERS])
def test_other_models_and_tasks(kind, tmp_path, monkeypatch):
    """fedavg and fedreft with their defaults, and fedalt, whose mixture no library has, where heads and layers have
    other names or forms."""
    config, fields = OTHERS[kind]
    model = {"path": "random", "tokenizer": "bytes", "config": config or LLAMA}
    fields = {"model": model, "clients": {"count": 2}, **fields}
    if fields.get("task") == "causal_lm":
        fields["data"] = {"source": "synthetic", "examples_per_client": 8, "max_length": 24}
    if fields.get("task") == "regression":
        rows = "".join(f'{{"text": "number {i}", "label": {i / 4}}}\n' for i in range(8))
        for name in ("client_000", CLIENT):
            (tmp_path / f"{name}.jsonl").write_text(rows.replace("number", name))
        files = {name: str(tmp_path / f"{name}.jsonl") for name in ("client_000", CLIENT)}
        fields["data"] = {"source": "files", "files": files, "max_length": 12}
    fedray.run(experiment(["fedavg", "fedreft", "fedalt"], **fields), output=tmp_path / "run")
    openers = {
        method: check(tmp_path / "run", method, CLIENT, tmp_path / method, monkeypatch).opener
        for method in ("fedavg", "fedreft", "fedalt")
    }
    merged = check(tmp_path / "run", "fedavg", CLIENT, tmp_path / "merged", monkeypatch, merge=True).opener
    known = kind not in QUICK
    assert openers["fedreft"] == ("pyreft" if known else "load.py")
    assert openers["fedalt"] == "load.py"
    assert (openers["fedavg"], merged) == (("load.py", "load.py") if kind == "pooled" else ("peft", "transformers"))


def test_a_checkpoint_s_model_names_the_checkpoint(tmp_path, monkeypatch):
    """The base is a folder of its own, which lacks BERT's pooler: the export brings the one that fedray drew."""
    from safetensors.numpy import load_file, save_file

    made = fedray.run(experiment(["fedavg"], model=tiny_bert(initializer_range=0.3)), output=tmp_path / "first")
    base = Path(export(made.place, "fedavg", CLIENT, to=tmp_path / "base", merge=True).folder)
    weights = load_file(base / "model.safetensors")
    kept = {name: np.array(value) for name, value in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    fedray.run(experiment(["fedavg"], model={"path": str(base)}), output=tmp_path / "run")
    check(tmp_path / "run", "fedavg", CLIENT, tmp_path / "out", monkeypatch)
    assert not list((tmp_path / "out" / "base").glob("*.safetensors"))
    assert f"base_model: {base}" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_adapter_kind_of_the_user_s_own_is_refused(own_folder):
    (own_folder / "shift.py").write_text(
        '''
from typing import ClassVar

import torch
from torch import nn

from fedray.adapters.adapter import Adapter
from fedray.adapters.context import ForwardContext
from fedray.adapters.group import Entry, Group
from fedray.adapters.heads import head_group
from fedray.adapters.kind import AdapterKind
from fedray.adapters.layout import Slot


class Shift(AdapterKind):
    """Adds a vector to the embeddings."""

    group: ClassVar[str] = "shift"

    def attach(self, model):
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings()
        embeddings.shift = nn.Parameter(torch.zeros(embeddings.embedding_dim, device=embeddings.weight.device))
        embeddings.register_forward_hook(lambda module, args, output: output + module.shift)
        entries = [Entry(Slot("embeddings", "tensor", tuple(embeddings.shift.shape)), embeddings.shift)]
        groups = [Group("shift", entries, lambda layout, seed: torch.zeros(layout.size).numpy()), head_group(model)]
        return Adapter(model, groups, ForwardContext(model))
''',
        "utf-8",
    )
    run = experiment([{"name": "fedavg", "adapter": {"class": "shift.Shift"}}])
    fedray.run(run, output="run")
    assert fedray.load("run", client=CLIENT).get_input_embeddings().shift.abs().sum() > 0
    with pytest.raises(ConfigError, match="adapter kind of its own"):
        export("run", "fedavg", CLIENT, to="out")
