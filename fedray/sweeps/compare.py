"""`fedray.compare`: the methods of runs and sweeps compared, given by their folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedray.errors import ComparisonError, choices
from fedray.results.comparison import Comparison
from fedray.results.comparison import compare as compare_runs
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath, resolve_storage
from fedray.types import Moment

if TYPE_CHECKING:
    from fedray.sweeps.result import SweepResult


def compare(
    *results: "RunResult | SweepResult | str | Path | StoragePath",
    reference: str | Sequence[str] = (),
    metric: str | None = None,
    moment: Moment | None = None,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Comparison:
    """Compare the methods of runs and sweeps, paired by seed and client. Runs on one data set are merged by seed.

    Args:
        results: runs and sweeps, or their folders; of a sweep, each method at its best point.
        reference: methods that the others are compared with; default `local` and `fedavg`.
        metric: label of a metric that all runs have; default their first one.
        moment: when clients are measured in the final pass: `personalised`, after local training, or `aggregated`,
            before it. Default: `personalised` where all runs have it (`evaluation.final`).
        methods, seeds: compare only these; default all.

    Raises:
        ComparisonError: the runs cannot be compared, or a folder is not that of a run or a sweep; the message says why.
        FedrayError: a file cannot be read.
    """
    runs, notes = opened_runs(results)
    return compare_runs(
        runs, references=reference, metric=metric, moment=moment, methods=methods, seeds=seeds, notes=notes
    )


def opened_runs(
    results: "Sequence[RunResult | SweepResult | str | Path | StoragePath]",
) -> tuple[list[RunResult], list[str]]:
    """Return the runs, of a sweep those of each method's best point, and notes about how these were chosen.

    Raises:
        ComparisonError: a folder is not that of a run or a sweep.
        FedrayError: a file cannot be read.
    """
    runs: list[RunResult] = []
    notes: list[str] = []
    for result in results:
        found = opened(result)
        if isinstance(found, RunResult):
            runs.append(found)
        else:
            runs += found.runs()
            notes += [found.choice] if found.choice else []
    return runs, notes


def opened(where: "RunResult | SweepResult | str | Path | StoragePath") -> "RunResult | SweepResult":
    """Return the run or the sweep in a folder; what is one already is returned as it is.

    Raises:
        ComparisonError: the folder is that of neither.
    """
    if not isinstance(where, str | Path | StoragePath):
        return where
    place = where if isinstance(where, StoragePath) else StoragePath.of(resolve_storage(where))
    if (place / "sweep.yaml").is_file():
        from fedray.sweeps.result import SweepResult  # imports torch, which comparing runs does not need

        return SweepResult.load(place)
    if (place / "config.yaml").is_file():
        return RunResult.load(place)
    inside = [name for name in place.names() if (place / name / "config.yaml").is_file()]
    hint = f"; it contains runs, which can be named: {choices(inside, 5)}" if inside else ""
    raise ComparisonError(
        f"{place}: is not the folder of a run (with config.yaml) or of a sweep (with sweep.yaml){hint}"
    )
