"""What every tracker is told, by a user's own: rounds once each, whatever happens to the run and to the tracker."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from calling import Calling
from examples import DOCS
from tracked import Seen

import fedray
from fedray.config import dump_yaml, load_config, parse_overrides, parse_yaml
from fedray.errors import ConfigError
from fedray.federation.events import MethodFinished, RoundFinished, RunStarted, SweepFinished, SweepStarted
from fedray.storage.paths import StoragePath
from fedray.sweeps.result import TrialFinished, TrialResult
from fedray.sweeps.space import Trial
from fedray.tracking.callback import TrackerFailure, Tracking

MINE = {"class": "my_tracker.JsonLines", "path": "seen.jsonl"}
WHOLE = [("fedavg", 1), ("fedavg", 2), ("fedavg/final", 2)]


def flaky(fails: str) -> dict[str, Any]:
    return {"class": "my_flaky.Flaky", "path": "seen.jsonl", "fails": fails}


def test_what_it_is_told(smallest: dict[str, Any], seen: Seen, own_folder: Path) -> None:
    """The configuration first, then rounds, then the tables and the report, which are written before the end."""
    report = Calling(
        lambda event: (own_folder / "run/report.html").write_text("12345") if type(event) is MethodFinished else None
    )
    result = fedray.run(smallest, method=["local", "fedavg"], tracking=MINE, output="run", callbacks=[report])
    begun, *rounds, summary, scores, attached, ended = seen.lines()
    assert begun["name"] == "run"
    assert begun["config"]["rounds"] == 2
    assert begun["config"]["tracking"] == [MINE]
    assert seen.steps() == [("local", 1), ("local", 2), ("local/final", 2), *WHOLE]
    row = result.rounds().query("method == 'fedavg' and server_round == 1 and phase == 'train'").iloc[0]
    metrics = rounds[4]["metrics"]
    assert metrics["fedavg/personalised_accuracy"] == row["personalised_mean"]
    assert metrics["fedavg/simulated_seconds"] == row["simulated_seconds"]
    assert metrics["fedavg/total_bytes"] == 2 * (row["uplink_bytes"] + row["downlink_bytes"]) > 0
    assert rounds[5]["metrics"]["fedavg/final_personalised_accuracy"] == result["fedavg"].personalised_mean
    assert [line["method"] for line in summary["rows"]] == ["local", "fedavg"]
    assert (summary["table"], scores["table"]) == ("summary", "scores")
    assert attached == {"run": "run-1", "attached": "report.html", "size": 5}
    assert ended["status"] == "finished"
    assert result.events().empty


def test_a_continued_run_is_the_same_run(smallest: dict[str, Any], seen: Seen) -> None:
    """Interrupted after the first round's checkpoint, continued to its end, and then by two more rounds."""

    def stop(event: Any) -> None:
        if isinstance(event, RoundFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedray.run(smallest, tracking=MINE, output="run", callbacks=[Calling(stop)])
    assert seen.lines()[-1]["status"] == "stopped"
    fedray.run(smallest, tracking=MINE, resume="run")
    assert seen.steps() == WHOLE
    fedray.run(smallest, rounds=4, tracking=MINE, resume="run")
    assert seen.steps() == [*WHOLE, ("fedavg", 3), ("fedavg", 4), ("fedavg/final", 4)]
    assert {line["run"] for line in seen.lines()} == {"run-1"}
    assert sum("config" in line for line in seen.lines()) == 1
    assert [line["status"] for line in seen.lines() if "status" in line] == ["stopped", "finished", "finished"]


def test_one_that_is_added_later_gets_all_rounds(smallest: dict[str, Any], seen: Seen) -> None:
    """And the final pass of the run as it was."""
    fedray.run(smallest, output="run")
    fedray.run(smallest, rounds=3, tracking=MINE, resume="run")
    assert seen.steps() == [*WHOLE, ("fedavg", 3), ("fedavg/final", 3)]


@pytest.mark.parametrize("fails", ["open", "log 2", "finish"])
def test_one_that_fails_ends_nothing(
    fails: str, smallest: dict[str, Any], seen: Seen, own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other tracker has everything. Once the network is back, the run's continuation logs what is missing, and
    nothing twice."""
    (own_folder / "down").touch()
    other = MINE | {"path": "other.jsonl"}
    with caplog.at_level(logging.WARNING, "fedray.tracking"):
        result = fedray.run(smallest, tracking=[flaky(fails), other], output="run")
    assert Seen(own_folder / "other.jsonl").steps() == WHOLE
    warnings = [message for message in caplog.messages if "tracker" in message]
    assert warnings == ["tracker Flaky: OSError: no route to host; the run is not affected"]
    events = result.events()
    assert set(events.kind) == {"tracker failed"}
    assert set(events.cause) == {"Flaky: OSError: no route to host"}
    assert set(events.method) == {"fedavg"}
    (own_folder / "down").unlink()
    fedray.run(smallest, rounds=3, tracking=[flaky(fails), other], resume="run")
    assert sorted(set(seen.steps())) == sorted(seen.steps())
    assert {("fedavg", 1), ("fedavg", 2), ("fedavg", 3), ("fedavg/final", 3)} <= set(seen.steps())


def test_one_that_recovers_has_everything_at_the_end(
    smallest: dict[str, Any], seen: Seen, own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own_folder / "down").touch()
    back = Calling(lambda event: (own_folder / "down").unlink() if type(event) is MethodFinished else None)
    result = fedray.run(smallest, tracking=flaky("log 1"), output="run", callbacks=[back])
    assert seen.steps() == WHOLE
    assert seen.lines()[-1]["status"] == "finished"
    (event,) = result.events().to_dict("records")
    assert (event["server_round"], event["action"]) == (0, "the run continued")
    assert sum("tracker Flaky" in message for message in caplog.messages) == 1


def test_a_run_that_fails_says_so(smallest: dict[str, Any], seen: Seen) -> None:
    """`callbacks` may end a run, and trackers see it fail."""

    def fail(event: Any) -> None:
        if isinstance(event, MethodFinished):
            raise RuntimeError("of a callback")

    with pytest.raises(RuntimeError, match="of a callback"):
        fedray.run(smallest, tracking=MINE, output="run", callbacks=[Calling(fail)])
    assert seen.steps() == WHOLE
    assert seen.lines()[-1]["status"] == "failed"


@pytest.mark.parametrize(("fails", "at"), [("open", ("", 0)), ("finish", ("fedavg", 1))])
def test_in_a_sweep_it_is_tried_again_at_the_end(
    fails: str, at: tuple[str, int], smallest: dict[str, Any], seen: Seen, own_folder: Path
) -> None:
    """The first trial cannot be logged or closed; the second is not tried, and at the sweep's end both are."""
    config = load_config(smallest | {"rounds": 1, "tracking": flaky(fails)})
    fedray.run(config, tracking=[], output="sweep/trials/0000")
    shutil.copytree("sweep/trials/0000", "sweep/trials/0001")
    failures: list[Any] = []
    tracking = Tracking(config.tracking[0], "mine", lambda place, failure: failures.append((place.name, failure)))
    sweep = StoragePath.of(own_folder / "sweep")
    tracking.on_event(SweepStarted(sweep, {}))
    (own_folder / "down").touch()
    for id in ("0000", "0001"):
        tracking.on_event(RunStarted(sweep / "trials" / id, config, trial=id))
        tracking.on_event(RoundFinished("fedavg", 0, False, None, None, None, 0, 0, 0.0, trial=id))
        tracking.on_event(TrialFinished(Trial(id, {}, config), TrialResult(id, "finished")))
    (own_folder / "down").unlink()
    assert not any("status" in line for line in seen.lines())
    assert failures == [], "nothing is written while trials run"
    tracking.on_event(SweepFinished(sweep, "finished", "", [{"trial": "0000"}]))
    for id in ("0000", "0001"):
        mine = [line for line in seen.lines() if line["run"] == f"sweep/{id}-1"]
        assert [line["step"] for line in mine if "step" in line] == [1, 1]
        assert mine[-1]["status"] == "finished"
    assert failures == [("0000", TrackerFailure("mine", *at, "OSError: no route to host"))]


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        (
            "tensorbord",
            r"tracking.0: unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\); allowed: mlflow, te",
        ),
        ([{"name": "wandb", "projekt": "x"}], r"tracking.0.projekt: unknown key \(did you mean 'project'\?\)"),
        ({"class": "my_tracker.Lines"}, "my_tracker.Lines must be a class derived from fedray.config.tracker.Tracker"),
        ({"class": "my_broken.Broken"}, "my_broken.Broken' cannot be imported: TypeError: Broken: has no function `op"),
        ({"class": "my_missing.Missing"}, "tracking.0: Missing needs the package no_such, .*pip install 'no_such'"),
        ("mlflow", "tracking.0: mlflow: no server; set `uri`, or MLFLOW_TRACKING_URI"),
        ({"name": "mlflow", "uri": "sqlite:///x.db"}, r"a database \(sqlite\) needs all of MLflow: pip install mlflow"),
        ("wandb", "tracking.0: wandb: no credentials; set WANDB_API_KEY"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(
    tracking: Any,
    message: str,
    smallest: dict[str, Any],
    seen: Seen,
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(own_folder / "netrc"))
    monkeypatch.setattr("fedray.tracking.trackers.mlflow.find_spec", lambda name: None)
    if "wandb" in str(tracking):
        pytest.importorskip("wandb")
    if "mlflow" in str(tracking):
        pytest.importorskip("mlflow")
    text = "from fedray.config import Tracker\n\n\nclass {}(Tracker):\n    package = 'no_such'\n"
    (own_folder / "my_broken.py").write_text(text.format("Broken"))
    (own_folder / "my_missing.py").write_text(text.format("Missing") + "\n    def open(self, run):\n        pass\n")
    with pytest.raises(ConfigError, match=message):
        fedray.run(smallest, tracking=tracking, output="run")
    assert not (own_folder / "run").exists()


def test_a_missing_package_names_the_extra(smallest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedray.config.tracker.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb needs the package wandb, .*: pip install 'fedray\[wandb\]'"):
        fedray.run(smallest, tracking="wandb")


def test_the_configurations_of_the_page_are_valid(smallest: dict[str, Any], seen: Seen) -> None:
    blocks = (DOCS / "tracking.md").read_text("utf-8").split("```yaml\n")[1:]
    found = [load_config(smallest | parse_yaml(block.split("```")[0], "page")).tracking for block in blocks]
    labels = [[tracker.label for tracker in trackers] for trackers in found]
    assert labels == [["tensorboard", "wandb", "mlflow"], ["wandb", "mlflow", "JsonLines"]]
    config = load_config(smallest, parse_overrides(["tracking=tensorboard"]))
    assert load_config(parse_yaml(dump_yaml(config), "it")) == config


def test_tensorboard_needs_a_folder_on_this_machine() -> None:
    from fedray.tracking.trackers.tensorboard import TensorBoard

    with pytest.raises(ConfigError, match="tensorboard: the run's folder is not on this machine; set `folder`"):
        TensorBoard().check(None)
    TensorBoard(folder="here").check(None)
