"""A row on fedray, through `fedray.run` alone.

    python with_fedray.py WORKLOAD WORKERS [FUSE | driver-dies] RESULT

FUSE is clients.fuse, the number of clients that train in one step. driver-dies kills the driver after the first round.

Every fedray run ends with a final pass over all clients, which no peer has. The program therefore stops as soon as the
last round is aggregated and its checkpoint, if there is one, is written. A round lasts from the end of the previous
round to its own end, as the caller sees it, and includes writing its rows.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import numpy as np
import pandas as pd
import psutil
from workloads import LETTER_A, Timeline, Workload

import fedray
from fedray.federation.events import Callback, RoundFinished
from fedray.storage.tables import read_table


class LastRoundEnded(Exception):
    """Ends the run."""


def config(workload: Workload, workers: int, folder: Path, fuse: str = "off") -> dict[str, Any]:
    """Return the row's configuration, with the run's data and caches below `folder`."""
    every_example = {"min_examples": 1, "validation_fraction": 0, "test_fraction": 0}
    common = {
        "rounds": workload.rounds,
        "clients": {
            "count": workload.clients,
            "per_round": workload.per_round,
            "actors": workers,
            "num_cpus": min(1, 2 / workers),
        }
        | {"fuse": int(fuse) if fuse.isdigit() else fuse},
        "evaluation": {"every": 0},
        "checkpoint": {"every": int(workload.row == "W6")},
        "device": "cpu",
    }
    if workload.kind != "lora":
        kind = "OneByOne" if workload.each else "OwnWork"
        tiny = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
                "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
        return common | {
            "method": [{"class": f"fedray_methods.{kind}", "workload": workload.to_json()}],
            "model": {"path": "random", "tokenizer": "bytes", "config": tiny},
            "data": {"source": "synthetic", "examples_per_client": 2, "classes": 2, "groups": 1}
            | {"conflict": 0, "cache_dir": str(folder)},
            "partition": {"kind": "by_file", **every_example},
            "lora": {"rank": 1},
        }
    stateful = {"class": "fedray_methods.StatefulFedAvg", "state": workload.state}
    return common | {
        "method": [stateful if workload.state else {"name": "fedavg"}],
        "task": "causal_lm",
        "model": {"path": str(workload.base), "tokenizer": "bytes"},
        "data": {"source": "files", "files": {"train": str(text_file(workload, folder))}}
        | {"prompt": "", "answer": "{text}", "max_length": workload.tokens, "cache_dir": str(folder)},
        "partition": {"kind": "by_column", "column": "client", **every_example},
        "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
        "train": {"batch_size": workload.batch, "max_steps": workload.steps, "lr": workload.lr, "clip": None},
    }


def text_file(workload: Workload, folder: Path) -> Path:
    """Write the texts that the tokenizer `bytes` maps to the row's tokens, unless the file exists; return the file."""
    path = folder / f"{workload.data.stem}.parquet"
    if not path.exists():
        letters = np.load(workload.data)[:, :, 1:-1]
        assert letters.min() >= LETTER_A, "the texts are lower-case letters between bos and eos"
        texts = [bytes(row.astype(np.uint8)).decode() for row in letters.reshape(-1, letters.shape[-1])]
        owners = np.repeat([f"c{client:05d}" for client in range(workload.clients)], workload.examples)
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"client": owners, "text": texts}).to_parquet(path)
    return path


def main(text: str, workers: str, *rest: str) -> None:
    *options, result = rest
    fuse, dies = [option for option in options if option != "driver-dies"], "driver-dies" in options
    workload, timeline = Workload(**json.loads(text)), Timeline(result)

    class Rounds(Callback):
        def on_round_finished(self, event: RoundFinished) -> None:
            nonlocal dies
            if dies:
                dies = False
                for process in psutil.Process().children(recursive=True):
                    if "ray::DriverActor" in " ".join(process.cmdline()):
                        process.kill()
            if not event.final:
                timeline.begin(monotonic() - event.seconds)
                timeline.end_round()
                if event.server_round + 1 == workload.rounds:
                    raise LastRoundEnded

    with TemporaryDirectory() as runs:
        try:
            folder = Path(workload.files) / "fedray"
            settings = config(workload, int(workers), folder, *fuse)
            fedray.run(settings, output=Path(runs) / "run", callbacks=[Rounds()])
        except LastRoundEnded:
            pass
        rounds = read_table(Path(runs) / "run", "rounds").to_pandas()
        server = next((Path(runs) / "run" / "checkpoints").glob(f"*/{workload.rounds:05d}/server.safetensors"), None)
        digest = None if server is None else sha256(server.read_bytes()).hexdigest()
        uplink = rounds["uplink_bytes"].iloc[0] / rounds["clients"].iloc[0]
        value = float(rounds.get("value", rounds["train_loss"]).iloc[-1])
        timeline.write(value=value, numbers=int(uplink) // 4, updates=rounds["clients"].tolist(), sha256=digest)


if __name__ == "__main__":
    main(*sys.argv[1:])
