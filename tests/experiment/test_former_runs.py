"""A run of fedray 0.1.0 before its packages were introduced: its states are read, and it can be continued.

`format_1` is the folder of that run without `adapters/`: eight entries of `method`, two rounds, three clients.
"""

import shutil
from pathlib import Path

import pytest

import fedray
from fedray.config import CheckpointConfig
from fedray.methods.registry import METHODS
from fedray.results.run_result import read_summaries
from fedray.storage.checkpoints import Checkpoints
from fedray.storage.client_states import StateFiles
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import sha256

RUN = Path(__file__).parent / "format_1"
SUMMARIES = {summary.method: summary for summary in read_summaries(StoragePath.of(RUN))}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run: reading checkpoints may delete what is not needed any more. Git keeps no empty folders."""
    copy = Path(shutil.copytree(RUN, tmp_path / "run"))
    for method in SUMMARIES:
        (copy / "states" / method).mkdir(exist_ok=True)
    return copy


@pytest.mark.parametrize("method", SUMMARIES)
def test_the_states_hash_to_what_the_run_recorded(method: str, run: Path) -> None:
    """`state_sha256` covers every path, type, shape and bit of the client states and the server's."""
    METHODS.find(method.partition("-")[0])  # registers the states' classes

    place = StoragePath.of(run)
    progress, broken = Checkpoints(place, method, CheckpointConfig()).newest()
    assert broken == []
    assert progress is not None
    assert progress.server_round == SUMMARIES[method].rounds == 2
    files = StateFiles(place / "states" / method)
    states = [
        (f"client/{client}", files.read([progress.client_states[client]])[0])
        for client in sorted(progress.client_states)
    ]
    assert len(states) == 3
    assert sha256([*states, ("server", progress.server)]) == SUMMARIES[method].state_sha256


def test_the_run_is_continued(run: Path) -> None:
    result = fedray.run(run / "config.yaml", resume=run, rounds=3)
    assert [summary.rounds for summary in result.summaries] == [3] * len(SUMMARIES)
    rounds = result.rounds().query("phase == 'train'")
    assert rounds.groupby("method").size().to_dict() == dict.fromkeys(SUMMARIES, 3)
    assert rounds["train_loss"].notna().all()
