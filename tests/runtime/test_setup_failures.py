"""What raises an exception while actors are set up ends the run at once, and is told; only lost processes are
replaced."""

from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config import ClientsConfig
from fedray.errors import ConfigError, FedrayError
from fedray.runtime.pool import ClientPool

ATTACH = {"class": "setup_faults.CannotAttach"}


def test_an_exception_in_setup_ends_the_run_at_the_first_attempt(
    smallest: dict[str, Any], cluster: None, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    config = {**smallest, "method": {**ATTACH, "marks": str(marks)}, "runtime": "ray"}
    with pytest.raises(FedrayError) as raised:
        fedray.run(config, output=tmp_path / "run", **{"clients.actors": 1})
    first, *_, last = str(raised.value).splitlines()
    assert first == "clients: an actor of tier 'default' cannot be set up: LookupError: the blocks have other names"
    assert last == "LookupError: the blocks have other names", "the end of the traceback"
    assert len(list(marks.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_exception_in_a_silos_worker_ends_the_run_at_the_first_attempt(
    smallest: dict[str, Any], cluster: None, tmp_path: Path
) -> None:
    tiers = {"silo": {"share": 1, "workers": 2, "num_cpus": 0.5, "num_gpus": 0, "actors": 1}}
    config = {**smallest, "method": {**ATTACH, "marks": str(tmp_path)}, "runtime": "ray"}
    with pytest.raises(FedrayError, match="tier 'silo' cannot be set up: LookupError: the blocks have other names"):
        fedray.run(config, output=tmp_path / "run", clients={"tiers": tiers})
    assert 1 <= len([file for file in tmp_path.iterdir() if file.name.isdigit()]) <= 2


def test_a_node_that_cannot_be_prepared_ends_the_run(cluster: None) -> None:
    tiers = {"only": {"share": 1, "engine": {"class": "setup_faults.CannotPrepare"}}}
    with pytest.raises(FedrayError, match="tier 'only' cannot be set up: LookupError: no compiler on this node"):
        ClientPool(ClientsConfig.model_validate({"tiers": tiers}), {}, {"only": 1})


def test_without_ray_the_exception_itself_ends_the_run(smallest: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="other names"):
        fedray.run({**smallest, "method": {**ATTACH, "marks": str(tmp_path)}}, output=tmp_path / "run")


def test_a_gpu_is_asked_for_where_there_is_none(smallest: dict[str, Any], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ConfigError, match="device: cuda, but torch finds no GPU on this machine; use device: auto"):
        fedray.run(smallest, device="cuda", output=tmp_path / "run")
