"""Relative paths start from the folder where the run is started, whatever folder its processes are in."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from examples import EXAMPLES
from tiny import tiny_bert

import fedray
from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.experiment.resume import resolve_run, with_absolute_paths
from fedray.models.tokenizer import byte_tokenizer


@pytest.fixture
def project(own_folder: Path, smallest: dict[str, Any]) -> dict[str, Any]:
    """An experiment whose model, tokenizer, data, cache and metric are in the current folder."""
    from transformers import BertConfig, BertForSequenceClassification

    fields = tiny_bert(max_position_embeddings=64, vocab_size=259)["config"]
    model = BertForSequenceClassification(BertConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
    model.save_pretrained("models/tiny")
    byte_tokenizer().save_pretrained("models/bytes")
    for client in ("ann", "bob"):
        folder = Path("data") / client
        folder.mkdir(parents=True)
        rows = [{"text": f"{client} says {number}", "label": number % 2} for number in range(16)]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("my_metric.py").write_text(EXAMPLES["my_metric.py"])
    return {
        **smallest,
        "rounds": 1,
        "model": {"path": "models/tiny", "tokenizer": "./models/bytes"},
        "data": {"source": "files", "files": {"train": "data/*/train.jsonl"}, "max_length": 16, "cache_dir": "cache"},
        "clients": {},
        "evaluation": {"metric": {"class": "my_metric.ErrorRate"}},
        "storage_path": "runs",
    }


def test_the_saved_configuration_holds_in_every_folder(
    project: dict[str, Any], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be run and continued from elsewhere, with the same bits; nothing is written there."""
    first = fedray.run(project)
    saved = yaml.safe_load((first.path / "config.yaml").read_text())
    assert first.path.parent == own_folder / "runs"
    assert saved["model"]["path"] == str(own_folder / "models" / "tiny")
    assert saved["model"]["tokenizer"] == str(own_folder / "models" / "bytes")
    assert saved["data"]["files"] == {"train": str(own_folder / "data" / "*" / "train.jsonl")}
    assert saved["data"]["cache_dir"] == str(own_folder / "cache")
    assert saved["storage_path"] == str(own_folder / "runs")
    assert (own_folder / "cache" / "backbones").is_dir()
    elsewhere = own_folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = fedray.run(first.path / "config.yaml", output=own_folder / "again")
    assert again["fedavg"].state_sha256 == first["fedavg"].state_sha256
    assert set(again.clients().client) == {"ann", "bob"}
    fedray.run(first.path / "config.yaml", rounds=2, resume=first.path)
    assert not list(elsewhere.iterdir())


def test_a_run_is_continued_however_its_paths_are_written(
    project: dict[str, Any], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fedray.run(project)
    fedray.run(project, rounds=2, resume=first.path)
    (own_folder / "link").symlink_to(own_folder / "models")
    fedray.run(project, rounds=2, model={"path": "link/tiny"}, resume=first.path)
    (own_folder / "deep").mkdir()
    monkeypatch.chdir(own_folder / "deep")
    changes = {"model": {"path": "../models/tiny", "tokenizer": "../models/bytes"}}
    files = {"train": "../data/*/train.jsonl"}
    fedray.run({**project, **changes}, rounds=2, data={"files": files}, resume=first.path)
    shutil.copytree("../data", "data")
    with pytest.raises(ConfigError, match=r"data\.files\.train: stored is .*, given is .*deep/data"):
        fedray.run({**project, **changes}, rounds=2, resume=first.path)


def test_a_run_of_an_older_version_with_relative_paths_is_continued(project: dict[str, Any]) -> None:
    first = fedray.run(project)
    saved = yaml.safe_load((first.path / "config.yaml").read_text())
    saved["model"] |= {"path": "models/tiny", "tokenizer": "./models/bytes"}
    saved["data"] |= {"files": {"train": "data/*/train.jsonl"}, "cache_dir": "cache"}
    (first.path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert fedray.run(project, rounds=2, resume=first.path)["fedavg"].rounds == 2


def test_processes_in_another_folder_find_everything(cluster: None, project: dict[str, Any], own_folder: Path) -> None:
    """The cluster began elsewhere, as after `ray.init()` in a notebook's first cell and `os.chdir` in its second."""
    inline = fedray.run(project)
    on_ray = fedray.run(project, runtime="ray", **{"clients.actors": 1})
    assert on_ray["fedavg"].state_sha256 == inline["fedavg"].state_sha256
    assert on_ray["fedavg"].metric_name == inline["fedavg"].metric_name == "ErrorRate"


def test_hub_ids_and_names_are_no_paths(project: dict[str, Any], own_folder: Path) -> None:
    names = {"model.path": "someone/model", "model.tokenizer": "package:somewhere"}
    config = with_absolute_paths(load_config(project, names))
    assert (config.model.path, config.model.tokenizer) == ("someone/model", "package:somewhere")
    data = {"source": "hub", "name": "someone/data", "cache_dir": "~/c"}
    found = with_absolute_paths(load_config({**project, "data": data, "storage_path": "s3://bucket/runs"}))
    assert (found.data.name, found.data.cache_dir) == ("someone/data", str(Path.home() / "c"))  # type: ignore[attr-defined]
    assert found.storage_path == "s3://bucket/runs"
    local = with_absolute_paths(load_config({**project, "data": {**data, "name": "data/ann"}}))
    assert local.data.name == str(own_folder / "data" / "ann")  # type: ignore[attr-defined]


def test_the_folder_of_an_engine(project: dict[str, Any], own_folder: Path) -> None:
    tiers = {"a": {"share": 1, "engine": "deepspeed", "offload": {"params": "nvme", "path": "disk"}}}
    config = with_absolute_paths(load_config({**project, "clients": {"tiers": tiers}}))
    assert config.clients.tiers["a"].engine.offload.path == str(own_folder / "disk")  # type: ignore[attr-defined]


def test_in_a_job_paths_stay_relative(
    project: dict[str, Any], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has a copy of the job's folder at a place of its own."""
    job = own_folder / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    os.symlink(own_folder / "models", "models")
    config, _ = resolve_run(load_config({**project, "evaluation": {}}), str(own_folder / "out"), None)
    assert (config.model.path, config.data.cache_dir) == ("models/tiny", "cache")
