"""Rows A1 and A2: fedray.aggregation against the direct computation, on one thread, in this process.

python aggregation_rows.py A1|A2 full|quick RESULT
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.aggregation.geometric_median import leave_one_out_geometric_medians
from fedray.aggregation.low_rank import LowRank, cluster_update, truncate
from fedray.aggregation.masks import random_rows

SAMPLE = 10
"""Separate runs that are timed; the others are assumed to take as long."""

Matrix = npt.NDArray[Any]
Row = dict[str, Any]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = perf_counter()
    result = function()
    return perf_counter() - started, result


def weiszfeld(points: Matrix, tolerance: float = 1e-7, most: int = 200) -> Matrix:
    """Return the geometric median by plain Weiszfeld iteration, with the stopping rule of `fedray.aggregation`."""
    x: Matrix = points.mean(axis=0)
    for _ in range(most):
        distances = [np.linalg.norm(point - x) for point in points]  # row by row, so that rows stay in the cache
        weights = (1 / np.maximum(distances, 1e-12)).astype(np.float32)
        target = weights @ points / weights.sum()
        slope = weights.sum() * np.linalg.norm(target - x)
        x = target
        if slope <= tolerance * len(points):
            break
    return x


def medians(count: int, d: int) -> Row:
    """Measure A1. The clients have very different spreads, so that the mean differs from the median."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((count, d), dtype=np.float32)
    points *= rng.lognormal(0, 1, (count, 1)).astype(np.float32)
    seconds, ours = timed(lambda: leave_one_out_geometric_medians(points))
    chosen = range(count) if count <= SAMPLE else sorted(rng.choice(count, SAMPLE, replace=False))
    theirs = [timed(partial(weiszfeld, np.delete(points, k, axis=0))) for k in chosen]
    scale = float(np.median([np.linalg.norm(point) for point in points]))
    apart = max(float(np.linalg.norm(ours[k] - x)) / scale for k, (_, x) in zip(chosen, theirs, strict=True))
    direct = sum(second for second, _ in theirs) * count / len(theirs)
    scaled = f"{len(theirs)} of {count} timed, rest extrapolated" if len(theirs) < count else "all timed"
    return {
        "row": f"A1, K = {count}",
        "seconds": seconds,
        "direct": direct,
        "note": f"{scaled}; largest distance {apart:.0e}",
    }


def factors(count: int, d: int, rank: int) -> Row:
    """Measure A2. Half of the rows are masked; both computations end with `rank` balanced columns."""
    rng = np.random.default_rng(0)
    updates = [LowRank(*(rng.standard_normal(shape, dtype=np.float32) for shape in ((d, rank), (rank, d))))
               for _ in range(count)]  # fmt: skip
    pi, masks = rng.uniform(0.1, 1, count), [random_rows(d, 0.5, rng) for _ in range(count)]
    norm = sum(share * mask for share, mask in zip(pi, masks, strict=True))
    rows = [
        np.divide(share * mask, norm, out=np.zeros(d), where=norm > 0) for share, mask in zip(pi, masks, strict=True)
    ]

    def dense() -> tuple[Matrix, Matrix, Matrix]:
        total = np.zeros((d, d), np.float32)
        for row, x in zip(rows, updates, strict=True):
            total += row.astype(np.float32)[:, np.newaxis] * (x.B @ x.A)
        u, s, vt = np.linalg.svd(total, full_matrices=False)
        return total, u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, np.newaxis] * vt[:rank]

    def low_rank() -> tuple[LowRank, LowRank]:
        whole = cluster_update(updates, pi, masks)
        return whole, truncate(whole, rank)

    seconds, (whole, cut) = timed(low_rank)
    direct, (total, b, a) = timed(dense)
    exact = np.zeros((d, d))
    for row, x in zip(rows, updates, strict=True):
        exact += row[:, np.newaxis] * (x.B.astype(np.float64) @ x.A)

    def error(matrix: Any) -> float:
        return float(np.linalg.norm(matrix - exact) / np.linalg.norm(exact))

    note = (
        f"relative error of the sum {error(whole.dense()):.1e}, dense {error(total):.1e}; "
        f"error at rank {rank} {error(cut.dense()):.6f}, dense {error(b @ a):.6f}"
    )
    return {"row": f"A2, K = {count}, {d} × {d}, r = {rank}", "seconds": seconds, "direct": direct, "note": note}


def main(which: str, size: str, result: str) -> None:
    quick = size == "quick"
    if which == "A1":
        found = [medians(count, 1000 if quick else 100_000) for count in ((5, 20) if quick else (10, 100, 1000))]
    else:
        found = [factors(5, 96, 4) if quick else factors(50, 4096, 32)]
    Path(result).write_text(json.dumps({"begun": 0, "ends": [0], "kernels": found}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
