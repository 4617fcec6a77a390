"""The experiments on public data sets are valid where the data are: files, columns, natural clients, models."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray.cli.app import app

ROOT = Path(__file__).parents[2]
SHARED = "../shared/data"

EXPECTED = {
    "banking77": ["20 clients, 77 classes", "client_019"],
    "baselines_banking77": ["10 clients, 77 classes", "client_009"],
    "baselines_clinc150": ["10 clients, 150 classes", "credit_cards"],
    "baselines_tasks": ["4 clients", "openbookqa"],
    "clinc150": ["10 clients, 150 classes", "credit_cards"],
    "dolly15k": ["10 clients", "client_09"],
    "dolly15k_by_category": ["8 clients", "creative_writing"],
    "llm_adapters": ["4 clients", "openbookqa"],
    "papers/k0_twin": ["1 client", "client_000"],
    "papers/k1_twin": ["5 clients", "client_004"],
    "papers/k2_twin": ["3 clients", "gsm8k"],
    "papers/k3_twin": ["3 clients", "client_002"],
    "papers/k4_twin": ["3 clients, 7 classes", "client_002"],
    "papers/k5_twin": ["8 clients", "banking77_intent"],
    "papers/k6_twin": ["8 clients", "clinc150_domain"],
    "papers/k7_twin": ["20 clients, 7 classes", "client_019"],
    "papers/k8_twin": ["10 clients", "client_009"],
    "papers/k10_twin": ["10 clients", "client_09"],
    "papers/k11_twin": ["6 clients", "unseen_openbookqa"],
    "snips": ["7 clients, 7 classes", "client_006"],
    "tinyshakespeare": ["52 clients", "KING HENRY VI", "Nurse"],
}
"""By the path of an experiment on shared data below jobs/: what `fedray validate` says of it, among other things."""


def test_every_experiment_on_shared_data_is_tried() -> None:
    jobs = ROOT / "jobs"
    paths = [*jobs.glob("*.yaml"), *(jobs / "papers").glob("*.yaml")]
    texts = {path.relative_to(jobs).with_suffix("").as_posix(): path.read_text() for path in paths}
    reading = {name for name, text in texts.items() if f" {SHARED}/" in text and "\nbase:" not in text}
    assert reading == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_an_experiment_on_shared_data_is_valid(
    name: str, shared_data: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ended: Any = CliRunner().invoke(app, ["validate", f"jobs/{name}.yaml", f"data.cache_dir={tmp_path}"])
    assert ended.exit_code == 0, ended.output
    assert "the experiment is valid" in ended.output
    assert all(expected in ended.output for expected in EXPECTED[name]), ended.output
