"""One of ten clients has wrong labels: where clients are alike, `update_checks.distance` finds it. Real text, real
weights."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from faults import Faulty

import fedray

CLIENTS, EXAMPLES, ROUNDS = 10, 64, 3
VICTIM = "c9"


@pytest.fixture
def config(shared_data: Path, minilm: Path, tmp_path: Path) -> dict[str, Any]:
    """Requests to a voice assistant, seven intents, dealt at random; the victim's labels are all wrong."""
    rows = [json.loads(line) for line in (shared_data / "snips" / "train.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    names = sorted({row["intent"] for row in rows})
    wrong = dict(zip(names, names[1:] + names[:1], strict=True))
    files = {}
    for i in range(CLIENTS):
        own = rows[i * EXAMPLES : (i + 1) * EXAMPLES]
        if f"c{i}" == VICTIM:
            own = [{**row, "intent": wrong[row["intent"]]} for row in own]
        file = tmp_path / f"c{i}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in own))
        files[f"c{i}"] = str(file)
    return {
        "name": "flips",
        "rounds": ROUNDS,
        "model": {"path": str(minilm)},
        "data": {"source": "files", "files": files, "label": "intent", "max_length": 32},
        "partition": {"kind": "by_file"},
        "train": {"lr": 3e-3, "batch_size": 16},
        "evaluation": {"every": 0},
        "clients": {"on_failure": "drop", "update_checks": {"distance": 1.15}},
        "device": "cpu",
        "runtime": "inline",
    }


@pytest.mark.slow
def test_wrong_labels_are_kept_out_and_touch_nobody(config: dict[str, Any], tmp_path: Path) -> None:
    """In every round; and the others' bits are those of an experiment in which the victim never answers."""
    fedavg: dict[str, Any] = {"class": f"{Faulty.__module__}.Faulty", "label": "fedavg", "head": "shared"}
    found = fedray.run({**config, "method": [fedavg]}, output=tmp_path / "flipped")
    events = found.events()
    left_out = events[events.action == "left out"]
    assert left_out.clients.map(list).tolist() == [[VICTIM]] * ROUNDS
    assert left_out.cause.str.contains("from the median of the round").all()
    silent = {**fedavg, "fault": "raise", "clients": [VICTIM]}
    without = fedray.run({**config, "method": [silent]}, output=tmp_path / "without")
    assert found["fedavg"].state_sha256 == without["fedavg"].state_sha256
