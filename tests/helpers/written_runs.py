"""Folders of runs with scores that a test chooses, so that what is computed from them can be derived by hand."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tiny import tiny_bert

from fedray.config import dump_yaml, load_config
from fedray.federation.summary import Summary
from fedray.results.run_result import RunResult

Scores = Mapping[str, Mapping[str, tuple[float | None, float | None, int | None]]]
"""By method and client: the score before and after the last local training, and the number of test examples."""


def write_run(
    folder: Path, scores: Scores, *, seed: int = 0, data: str = "data", state: str = "state", **fields: Any
) -> RunResult:
    """Write the folder of a run, and read it.

    Args:
        scores: of the final pass.
        data: distinguishes the data of different runs with one seed.
        state: distinguishes the results of a method in different runs with one seed.
        fields: of the configuration, by dotted path.
    """
    raw = {
        "seed": seed,
        "rounds": 2,
        "method": list(scores),
        "model": tiny_bert(),
        "data": {"source": "synthetic"},
        "clients": {"count": 3},
    }
    config = load_config(raw, fields)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    rows: list[dict[str, Any]] = []
    for method, clients in scores.items():
        for phase in ("train", "final"):
            for client, (aggregated, personalised, examples) in clients.items():
                after = personalised if phase == "final" else 0.123
                rows.append(
                    {
                        "method": method,
                        "phase": phase,
                        "client": client,
                        "aggregated_metric": aggregated,
                        "personalised_metric": after,
                        "test_examples": examples,
                    }
                )
    pd.DataFrame(rows).to_parquet(folder / "clients.parquet")
    summaries = [
        Summary(
            **dict.fromkeys(Summary.__dataclass_fields__, 0)
            | {"method": method, "seed": seed, "data_sha256": f"{data}-{seed}", "state_sha256": f"{state}-{method}"}
        )
        for method in scores
    ]
    (folder / "summary.json").write_text(json.dumps([asdict(summary) for summary in summaries]))
    return RunResult.load(folder)


def same_examples(scores: Mapping[str, Mapping[str, tuple[float, float]]], examples: int = 10) -> Scores:
    """Return scores of clients that all have as many test examples."""
    return {
        method: {client: (*pair, examples) for client, pair in clients.items()} for method, clients in scores.items()
    }


def personalised(scores: Mapping[str, list[float]], examples: int = 10) -> Scores:
    """Return scores after local training, of clients a, b, c, ...; before it they were 0."""
    return {
        method: {chr(ord("a") + i): (0.0, value, examples) for i, value in enumerate(values)}
        for method, values in scores.items()
    }
