"""The trials of a sweep as a tracker sees them: runs of their own, in a group named after the sweep's folder."""

from pathlib import Path
from typing import Any

import pytest
from calling import Calling
from examples import EXAMPLES
from tracked import Seen, tensorboard_scalars

import fedray
from fedray.federation.events import RoundFinished, SweepFinished


def test_each_trial_is_a_run(smallest: dict[str, Any], cluster: None, own_folder: Path) -> None:
    """The second trial fails, because its learning rate is too large. The first is interrupted and continued: it is the
    same run, and no round is logged twice, though only every other round has the metric."""
    (own_folder / "my_tracker.py").write_text(EXAMPLES["my_tracker.py"])
    tracking = ["tensorboard", {"class": "my_tracker.JsonLines", "path": str(own_folder / "seen.jsonl")}]
    base = smallest | {"rounds": 3, "evaluation": {"every": 2}, "tracking": tracking}
    arguments: dict[str, Any] = {"space": {"train.lr": [1e-3, 1e30]}, "max_concurrent": 1}

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, RoundFinished):
            raise Stop

    with pytest.raises(Stop):
        fedray.sweep(base, **arguments, output="sweep", callbacks=[Calling(stop)])
    told: list[Any] = []
    fedray.sweep(base, **arguments, resume="sweep", callbacks=[Calling(told.append)])

    lines = Seen(own_folder / "seen.jsonl").lines()
    begun = [line for line in lines if "config" in line]
    assert {line["group"] for line in begun} == {"sweep"}
    assert [line["name"] for line in begun] == ["sweep", "sweep/0000", "sweep/0001"]
    assert begun[1]["config"]["train"]["lr"] == 1e-3
    of = {
        name: [line for line in lines if line["run"] == f"{name}-1"] for name in ("sweep", "sweep/0000", "sweep/0001")
    }
    assert [line["step"] for line in of["sweep/0000"] if "step" in line] == [1, 2, 3, 3]
    assert [line["status"] for line in of["sweep/0000"] if "status" in line] == ["failed", "finished"]
    assert of["sweep/0001"][-1]["status"] == "failed"
    (trials,) = [line["rows"] for line in of["sweep"] if line.get("table") == "trials"][1:]
    assert [row["status"] for row in trials] == ["finished", "failed"]
    assert of["sweep"][-1]["status"] == "finished"
    folder = own_folder / "sweep" / "trials" / "0000" / "trackers" / "tensorboard"
    losses = [step for tag, step, _ in tensorboard_scalars(folder) if tag == "fedavg/train_loss"]
    assert sorted(losses) == [1, 2, 3]
    assert isinstance(told[-1], SweepFinished)
