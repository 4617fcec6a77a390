"""Named test sets and the common test set, from files to the tables of a run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from tiny import TINY_LLAMA, tiny_bert

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.evaluation.metrics import configured_metrics
from fedray.experiment.prepare import prepare
from fedray.results.run_result import RunResult
from fedray.results.score_tables import SHOWN_GROUPS, further_scores

LABELS = ("no", "yes")
Experiment = Callable[..., dict[str, Any]]


def rows_of(start: int, count: int) -> list[dict[str, str]]:
    return [{"text": f"{LABELS[i % 2]} {i}", "label": LABELS[i % 2]} for i in range(start, start + count)]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Return a function that makes an experiment with four clients from files with these numbers of rows."""

    def write(name: str, start: int, count: int) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(start, count)))
        return str(path)

    def paths(role: str, sizes: Mapping[str, int] | int, start: int) -> Any:
        if isinstance(sizes, int):
            return write(role, start, sizes)
        return {name: write(f"{role}-{name}", start + 100 * i, n) for i, (name, n) in enumerate(sizes.items())}

    def make(tests: Mapping[str, int] | int = 24, common: Mapping[str, int] | int = 0, **changes: Any) -> Any:
        files = {"train": write("train", 0, 80), "test": paths("test", tests, 1000)}
        files |= {"common": paths("common", common, 5000)} if common else {}
        return {
            "rounds": 2,
            "method": ["fedavg", "fedalt"],
            "model": tiny_bert(),
            "data": {"source": "files", "files": files, "max_length": 16, "cache_dir": str(tmp_path / "cache")},
            "clients": {"count": 4},
            "train": {"batch_size": 8, "lr": 0.02},
            "device": "cpu",
            "runtime": "inline",
            "storage_path": str(tmp_path / "runs"),
            **changes,
        }

    return make


def at(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def test_named_test_sets_are_scored_apart_and_together(experiment: Experiment) -> None:
    """A client's accuracy on all its test examples is the mean over its sets, weighted by their examples. Every row of
    the two files is some client's."""
    table = fedray.run(experiment({"matched": 24, "mismatched": 16})).evaluations()
    tests = at(table, examples="test", moment="personalised", phase="final")
    assert set(tests.group) == {"", "matched", "mismatched"}
    assert tests.groupby(["method", "group"]).num_examples.sum().to_dict() == {
        (method, group): count
        for method in ("fedavg", "fedalt")
        for group, count in (("", 40), ("matched", 24), ("mismatched", 16))
    }
    for _, mine in tests.groupby(["method", "client"]):
        whole, parts = at(mine, group=""), mine[mine.group != ""]
        for column in ("value", "loss"):
            assert whole[column].item() == pytest.approx(np.average(parts[column], weights=parts.num_examples))


def test_one_test_set_has_no_groups(experiment: Experiment) -> None:
    prepared = prepare(load_config(experiment()))
    assert prepared.data.common is None
    assert all("group" not in shard.tables["test"].column_names for shard in prepared.data.shards.values())


def test_the_servers_model_and_every_clients_on_the_common_test_set(experiment: Experiment) -> None:
    """FedAvg has one model for all clients, FedALT has none. Before local training, all clients of FedAvg have the
    server's model, and so its score; each has all rows of the common set."""
    result = fedray.run(experiment(common={"easy": 12, "hard": 20}))
    table = at(result.evaluations(), examples="common", group="")
    assert set(table.num_examples) == {32}
    server = at(table, moment="server")
    assert set(server.method) == {"fedavg"}
    assert server.client.isna().all()
    assert server.server_round.tolist() == [0, 1, 2], "once in every round, and in the final pass"
    assert at(table, method="fedavg", moment="aggregated").empty, "the same as the server's"
    for method, moment in (("fedavg", "personalised"), ("fedalt", "aggregated"), ("fedalt", "personalised")):
        assert at(table, method=method, moment=moment).groupby("server_round").size().tolist() == [4, 4, 4]
    clients = fedray.run(experiment(common={"easy": 12, "hard": 20}, evaluation={"common": ["aggregated"]}))
    alike = at(clients.evaluations(), method="fedavg", examples="common", group="", moment="aggregated")
    for server_round, mine in alike.groupby("server_round"):
        assert mine.loss.tolist() == pytest.approx([at(server, server_round=server_round).loss.item()] * 4, rel=1e-6)
    rounds = at(result.rounds(), method="fedavg")
    assert rounds.common_server.tolist() == server.value.tolist()
    scores = at(result.scores(), method="fedavg", examples="common", moment="server", group="hard")
    assert scores["clients"].tolist() == [1]


def test_the_common_test_set_is_no_clients_own(experiment: Experiment) -> None:
    """It changes neither the assignment nor the training, and it is part of the data's fingerprint."""
    without, with_common = (fedray.run(experiment(common=common)) for common in (0, 12))
    for one, two in zip(without.summaries, with_common.summaries, strict=True):
        assert one.state_sha256 == two.state_sha256
        assert one.data_sha256 != two.data_sha256
    own = at(with_common.evaluations(), examples="test", phase="final", moment="personalised", method="fedavg")
    assert own.num_examples.sum() == 24


@pytest.mark.ray
def test_ray_and_inline_measure_the_same(experiment: Experiment, cluster: None) -> None:
    config = experiment({"a": 16, "b": 8}, {"c": 8, "d": 12})
    here, there = (fedray.run({**config, "runtime": runtime}).evaluations() for runtime in ("inline", "ray"))
    pd.testing.assert_frame_equal(here, there)


def test_clients_in_one_step_measure_the_same_up_to_rounding(experiment: Experiment) -> None:
    config = experiment({"a": 16, "b": 8}, {"c": 8, "d": 12})
    alone, together = (
        fedray.run({**config, "clients": {"count": 4, "fuse": fuse}}).evaluations() for fuse in ("off", 4)
    )
    pd.testing.assert_frame_equal(alone.drop(columns=["value", "loss"]), together.drop(columns=["value", "loss"]))
    assert together.loss.tolist() == pytest.approx(alone.loss.tolist(), rel=1e-4)


def test_several_metrics_have_rows_of_their_own(experiment: Experiment) -> None:
    """The first one is the one that tables show; the other is computed from the same predictions."""
    config = experiment(evaluation={"metrics": ["matthews", "accuracy"]}, method="fedavg")
    result = fedray.run(config)
    tests = at(result.evaluations(), examples="test", phase="final", moment="personalised")
    assert tests.groupby("metric").size().to_dict() == {"matthews": 4, "accuracy": 4}
    assert result["fedavg"].metric_name == "matthews"
    assert result["fedavg"].personalised_mean == at(tests, metric="matthews").value.mean()
    only = fedray.run(config | {"evaluation": {"metric": "accuracy"}}).evaluations()
    accuracy = at(only, examples="test", phase="final", moment="personalised").value
    assert accuracy.tolist() == at(tests, metric="accuracy").value.tolist()
    assert load_config(result.path / "config.yaml").evaluation == load_config(config).evaluation


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"metrics": ["accuracy", "accuracy"]}, "'accuracy' occurs more than once"),
        ({"metric": "accuracy", "metrics": ["matthews"]}, "name the metrics in one of the two"),
        ({"metrics": ["accuracy", "pearson"]}, "'pearson' cannot be computed for the task 'classification'"),
        ({"common": ["clients"]}, r"evaluation.common.0: got 'clients'"),
    ],
)
def test_mistakes(experiment: Experiment, evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(experiment(evaluation=evaluation)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": {"a": "x"}}, "data.files.train: names no file for train"),
        ({"train": "x", "validation": {"a": "x"}}, "data.files.validation: expected a path; only test and common name"),
        ({"train": "x", "comon": "x"}, r"data.files: unknown split 'comon' \(did you mean 'common'\?\)"),
    ],
)
def test_mistakes_in_files(experiment: Experiment, files: dict[str, Any], message: str) -> None:
    config = experiment()
    config["data"]["files"] = {role: config["data"]["files"]["train"] if f == "x" else f for role, f in files.items()}
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(config))


def test_tasks_are_groups_where_clients_mix_them(experiment: Experiment) -> None:
    """`mixed_task`: every client has examples of both tasks, and a score of each."""
    config = experiment(partition={"kind": "mixed_task"}, method="fedavg")
    files = config["data"]["files"]
    config["data"]["files"] = {"one": {"train": files["train"]}, "two": {"train": files["test"]}}
    table = fedray.run(config).evaluations()
    assert set(at(table, examples="test").group) == {"", "one", "two"}
    assert set(at(table, examples="validation").group) == {"", "one", "two"}


def test_a_summary_of_a_former_version_can_be_read(experiment: Experiment) -> None:
    """It has no validation scores."""
    result = fedray.run(experiment(method="fedavg"))
    file = result.path / "summary.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps([{k: v for k, v in e.items() if not k.startswith("validation")} for e in entries]))
    (former,) = RunResult.load(result.path).summaries
    assert former.validation_personalised_mean is None
    assert former.personalised_mean == result["fedavg"].personalised_mean


def test_the_console_shows_what_the_table_of_methods_lacks(experiment: Experiment, capsys: Any) -> None:
    config = load_config(experiment(common={"c": 8, "d": 12}, evaluation={"metrics": ["accuracy", "matthews"]}))
    result = fedray.run(config)
    table = further_scores(result.scores(), configured_metrics(config))
    assert table is not None
    Console(width=120).print(table)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("fedavg")]
    expected = at(result.scores(), method="fedavg", examples="common", group="c", metric="accuracy", moment="server")
    assert [line[:5] for line in lines if line[1:4] == ["common", "c", "accuracy"]] == [
        ["fedavg", "common", "c", "accuracy", f"{100 * expected['mean'].item():.1f}"]
    ]
    assert [line[1:4] for line in lines] == [
        ["test", "all", "matthews"],
        *(
            [examples, group, label]
            for examples, group in (("common", "all"), ("common", "c"), ("common", "d"))
            for label in ("accuracy", "matthews")
        ),
    ]
    scores = result.scores()
    (one,) = {row["group"]: row for row in scores.query("group == 'c'").to_dict("records")}.values()
    many = pd.concat([scores, pd.DataFrame([one | {"group": f"g{number}"} for number in range(SHOWN_GROUPS)])])
    table = further_scores(many, configured_metrics(config))
    assert table is not None
    groups = list(table.columns[2].cells)
    assert "all" in groups
    assert "c" not in groups
    plain = load_config(experiment())
    assert further_scores(fedray.run(plain).scores(), configured_metrics(plain)) is None


def test_what_every_example_scored_is_kept(experiment: Experiment) -> None:
    """Its mean over a client's examples is the client's score. Numbers of examples are those of the client's own table,
    so methods can be paired."""
    config = experiment(common=8, evaluation={"metrics": ["accuracy", "matthews"], "examples": True})
    result = fedray.run(config)
    kept, table = result.examples(), at(result.evaluations(), phase="final", metric="accuracy", group="")
    assert "matthews" not in kept.columns, "a single example has none"
    keys = ["method", "moment", "examples"]
    for (method, moment, examples), mine in kept.groupby(keys):
        expected = at(table, method=method, moment=moment, examples=examples)
        for client, own in mine.groupby("client", dropna=False):
            row = expected[expected.client.isna()] if moment == "server" else at(expected, client=client)
            assert own.example.tolist() == list(range(row.num_examples.item()))
            assert own.accuracy.mean() == pytest.approx(row.value.item())
            assert own.loss.mean() == pytest.approx(row.loss.item(), rel=1e-6)
    shards = prepare(load_config(config)).data.shards
    mine = at(kept, method="fedavg", moment="personalised", examples="test", client=min(shards))
    labels = shards[min(shards)].tables["test"]["labels"].to_pylist()
    assert mine.accuracy.tolist() == [float(p == y) for p, y in zip(mine.prediction, labels, strict=True)]
    together = fedray.run({**config, "clients": {"count": 4, "fuse": 4}}).examples()
    pd.testing.assert_frame_equal(kept[[*keys, "client", "example"]], together[[*keys, "client", "example"]])
    assert not (fedray.run(experiment()).path / "examples.parquet").exists()


def test_generated_texts_are_kept(experiment: Experiment) -> None:
    config = experiment(task="causal_lm", method="fedavg", evaluation={"metric": "exact_match", "examples": True})
    config["model"] = {"path": "random", "tokenizer": "bytes", "config": TINY_LLAMA}
    config["data"] |= {"prompt": "{text}", "answer": "{label}", "max_length": 24}
    config["evaluation"] |= {"max_new_tokens": 3}
    result = fedray.run(config)
    kept = at(result.examples(), moment="personalised", examples="test")
    assert kept.text.map(type).eq(str).all()
    score = at(result.evaluations(), phase="final", moment="personalised", examples="test").value.mean()
    assert kept.groupby("client").exact_match.mean().mean() == pytest.approx(score)
