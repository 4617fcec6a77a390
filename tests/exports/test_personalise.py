"""A client that arrives after the run, and the commands `fedray export` and `fedray personalise`."""

import json

import pytest
import torch
from opened import batch, logits, opened_logits
from tiny import TINY_LLAMA
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.config import load_config
from fedray.data.load import load_newcomer
from fedray.errors import ConfigError
from fedray.evaluation.evaluate import evaluate
from fedray.experiment.restore import restore

WORDS = {"animals": ["cat", "dog", "lion", "hen"], "food": ["bread", "pie", "soup", "jam"]}


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def rows(start, number, labels=("animals", "food")):
    """Return short texts about a word of their class."""
    return [
        {"text": f"{WORDS[label][(start + i) % 4]} {start + i}", "label": label}
        for i in range(number)
        for label in labels
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a run of two clients, and of the files of one that arrives later."""
    folder = tmp_path_factory.mktemp("personalise")
    files = {name: str(write(folder / f"{name}.jsonl", rows(10 * i, 6))) for i, name in enumerate(("ada", "bo"))}
    write(folder / "cy.jsonl", rows(50, 7))
    write(folder / "cy-test.jsonl", rows(70, 3))
    fedray.run(
        {
            "runtime": "inline",
            "device": "cpu",
            "rounds": 1,
            "seed": 3,
            "method": ["fedavg", "fedalt", {"name": "fedhft", "clusters": 2}],
            "model": {
                "path": "random",
                "tokenizer": "bytes",
                "config": {**TINY_LLAMA, "initializer_range": 0.3, "pad_token_id": 256},
            },
            "data": {"source": "files", "files": files, "max_length": 12},
            "partition": {"kind": "by_file"},
            "lora": {"rank": 2, "alpha": 8},
            "train": {"lr": 2e-2, "epochs": 2, "batch_size": 4},
        },
        output=folder / "run",
    )
    return folder


def test_it_starts_from_the_server_s_model_and_learns(home):
    """`aggregated` is the loss of the server's model on the new client's test examples."""
    found = fedray.personalise(home / "run", "fedavg", data=home / "cy.jsonl", test=home / "cy-test.jsonl")
    assert (found.client.id, found.client.num_examples) == ("cy", 12)  # 15 % of 14 are held out for validation
    server = restore(home / "run", "fedavg", device="cpu")
    config = load_config(home / "run" / "config.yaml")
    files = {"train": str(home / "cy.jsonl"), "test": str(home / "cy-test.jsonl")}
    shard = load_newcomer(config, server.tokenizer, "cy", files, server.label_names).shards["cy"]
    expected = evaluate(server.model, shard.tables["test"], "classification", (), 4, 256, "cpu")
    before, after = (found.report.evaluation(moment) for moment in ("aggregated", "personalised"))
    assert before.num_examples == after.num_examples == 6
    assert before.loss == pytest.approx(expected.loss, rel=1e-5)
    on_training = evaluate(found.model, shard.tables["train"], "classification", (), 4, 256, "cpu")
    assert on_training.loss < evaluate(server.model, shard.tables["train"], "classification", (), 4, 256, "cpu").loss


@pytest.mark.parametrize(("method", "opener"), [("fedalt", "load.py"), ("fedhft", "peft")])
def test_its_model_is_exported(home, method, opener, tmp_path, monkeypatch):
    """Trained twice, it has the same bits; so what is exported can be compared with what is not."""
    kept = fedray.personalise(home / "run", method, data=home / "cy.jsonl")
    sent = fedray.personalise(home / "run", method, data=home / "cy.jsonl", to=tmp_path / "out")
    assert sent.model is None
    assert sent.exported.opener == opener
    theirs = opened_logits(tmp_path / "out", opener, monkeypatch)
    torch.testing.assert_close(theirs, logits(kept.model, batch()), rtol=1e-5, atol=2e-6)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"fedray personalise RUN --client cy --data cy.jsonl --method {method} --to out" in card


def test_examples_of_one_class_are_enough(home, tmp_path):
    file = write(tmp_path / "one.jsonl", rows(0, 8, ("food",)))
    assert fedray.personalise(home / "run", "fedavg", data=file).report.steps > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": "ada"}, "already a client"),
        ({"tier": "strong"}, "no tier 'strong'.*it has default"),
        ({"method": "fedalts"}, "did you mean 'fedalt'"),
        ({"data": "missing.jsonl"}, "no such file"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(home, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        fedray.personalise(home / "run", **{"method": "fedavg", "data": home / "cy.jsonl", **changes})


def test_a_class_that_the_model_does_not_know_is_refused(home, tmp_path):
    file = write(tmp_path / "new.jsonl", [*rows(0, 4), {"text": "a goal", "label": "foods"}])
    with pytest.raises(ConfigError, match=r"line 9.*'foods' \(did you mean 'food'\?\); it knows 'animals', 'food'"):
        fedray.personalise(home / "run", "fedavg", data=file)


def test_the_commands(home, tmp_path):
    def ran(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    run = home / "run"
    done = ran("export", run, "--method", "fedavg", "--server", "--to", tmp_path / "server")
    assert done.exit_code == 0, done.output
    assert "opens with peft" in done.output
    assert (tmp_path / "server" / "adapter_model.safetensors").is_file()
    newcomer = ("personalise", run, "--method", "fedavg", "--data", home / "cy.jsonl", "--merge")
    done = ran(*newcomer, "--to", tmp_path / "cy")
    assert done.exit_code == 0, done.output
    assert "after local training" in done.output
    assert (tmp_path / "cy" / "model.safetensors").is_file()
    done = ran("export", run, "--method", "fedavg", "--to", tmp_path / "neither")
    assert (done.exit_code, "--client, --server" in done.output) == (2, True)
    done = ran(*newcomer)
    assert (done.exit_code, "needs --to" in done.output) == (2, True)
