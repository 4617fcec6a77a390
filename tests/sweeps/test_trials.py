"""Which trials a sweep has, and what its results say together: hand-derived numbers, no Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny import tiny_bert

from fedray.config import SweepConfig, load_config, load_sweep
from fedray.errors import ConfigError, StateError
from fedray.results.statistics import confidence_interval
from fedray.storage.paths import StoragePath
from fedray.sweeps.result import SweepResult, TrialResult, begin, resumed
from fedray.sweeps.space import trials_of

BASE: dict[str, Any] = {
    "rounds": 2,
    "method": "fedavg",
    "model": tiny_bert(),
    "data": {"source": "synthetic", "examples_per_client": 12, "max_length": 16},
    "clients": {"count": 3},
}


def points(space: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [dict(trial.point) for trial in trials_of(load_sweep({"base": BASE, "space": space, **fields}))]


def test_a_grid_is_every_combination_in_order() -> None:
    found = points({"method": ["fedavg", "fedalt"], "train.lr": [0.1, 0.2], "seed": [0, 1]})
    assert len(found) == 8
    assert found[:3] == [
        {"method": "fedavg", "train.lr": 0.1, "seed": 0},
        {"method": "fedavg", "train.lr": 0.1, "seed": 1},
        {"method": "fedavg", "train.lr": 0.2, "seed": 0},
    ]
    assert found[-1] == {"method": "fedalt", "train.lr": 0.2, "seed": 1}


def test_trials_are_experiments_with_one_method() -> None:
    trials = trials_of(
        load_sweep(
            {"base": BASE, "space": {"method": ["local", {"name": "fedreft", "label": "mine"}], "lora.rank": [2]}}
        )
    )
    assert [(trial.id, trial.method, trial.config.lora.rank) for trial in trials] == [
        ("0000", "local", 2),
        ("0001", "mine", 2),
    ]


def test_a_base_with_several_methods_is_a_grid_over_them() -> None:
    base = BASE | {"method": ["fedavg", {"name": "fedreft", "lam": 0.3, "mixing": "fixed"}]}
    trials = trials_of(load_sweep({"base": base, "space": {"seed": [4, 5]}}))
    assert [(trial.method, trial.config.seed) for trial in trials] == [
        ("fedavg", 4),
        ("fedavg", 5),
        ("fedreft", 4),
        ("fedreft", 5),
    ]
    assert {trial.config.method[0].hyperparameters.get("lam") for trial in trials} == {None, 0.3}


def test_hyperparameters_of_the_trials_method() -> None:
    base = BASE | {"method": {"name": "fedreft", "mixing": "fixed"}}
    trials = trials_of(load_sweep({"base": base, "space": {"method.lam": [0.1, 0.9]}}))
    assert [trial.config.method[0].hyperparameters["lam"] for trial in trials] == [0.1, 0.9]


def test_draws_are_the_same_for_every_seed_and_method() -> None:
    space = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "lora.rank": {"randint": [1, 9]}}
    found = points(space | {"method": ["fedavg", "fedalt"], "seed": [0, 1, 2]}, num_samples=5)
    assert len(found) == 30
    for sample in range(5):
        mine = found[6 * sample : 6 * sample + 6]
        assert len({(point["train.lr"], point["lora.rank"]) for point in mine}) == 1
    drawn = {point["train.lr"] for point in found}
    assert len(drawn) == 5
    assert found == points(space | {"method": ["fedavg", "fedalt"], "seed": [0, 1, 2]}, num_samples=5)
    assert drawn.isdisjoint(point["train.lr"] for point in points(space, num_samples=5, draws_seed=1))


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.integers(0, 99))
def test_draws_lie_in_their_range(one: float, other: float, seed: int) -> None:
    low, high = sorted((one, other))
    if low == high:
        return
    from fedray.sweeps.space import _drawn

    for kind in ("uniform", "loguniform"):
        assert low * (1 - 1e-9) <= _drawn("x", {kind: [low, high]}, seed, 0) <= high * (1 + 1e-9)
    assert _drawn("x", {"randint": [3, 5]}, seed, 0) in (3, 4)
    assert _drawn("x", {"choice": ["a", "b"]}, seed, 0) in ("a", "b")


def test_loguniform_draws_have_uniform_logarithms() -> None:
    from fedray.sweeps.space import _drawn

    drawn = [_drawn("x", {"loguniform": [1e-4, 1.0]}, 0, sample) for sample in range(400)]
    assert stats.kstest(np.log10(drawn), stats.uniform(-4, 4).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"traim.lr": [1]}}, r"traim: unknown key \(did you mean 'train'\?\)"),
        ({"space": {"train.rate": [1]}}, r"train.rate: unknown key"),
        ({"space": {"train.lr": ["fast"]}}, r"train.lr=fast: .*train.lr: got 'fast'"),
        ({"space": {"method.lam": [0.5]}}, r"unknown hyperparameter 'lam'"),
        ({"space": {"method": ["fedavgg"]}}, r"fedavgg"),
        ({"space": {"train.lr": []}}, r"space.train.lr: an empty list"),
        ({"space": {"train.lr": {"uniform": [1, 0]}}}, r"low < high"),
        ({"space": {"train.lr": {"loguniform": [0, 1]}}}, r"0 < low < high"),
        ({"space": {"train.lr": {"uniform": [1]}}}, r"needs \[low, high\]"),
        ({"space": {"lora.rank": {"randint": [1.5, 1.9]}}}, r"two whole numbers"),
        ({"space": {"train.lr": {"uniform": [0, float("inf")]}}}, r"two numbers"),
        ({"space": {"seed": [0, 1, 0]}}, r"space.seed: 0 occurs more than once"),
        ({"scheduler": {"grace_rounds": 2}}, r"grace_rounds: 2, but a trial has only 2 rounds"),
        ({"scheduler": "asha", "space": {"evaluation.every": [0], "seed": [0, 1]}}, r"measures it only at the end"),
        ({"space": {"evaluation.final": ["both", "aggregated"]}}, r"metric: personalised_mean is not measured with"),
        ({"space": {"train.lr": {"normal": [0, 1]}}}, r"expected a list of values or one of uniform"),
        (
            {"space": {"method": [{"name": "local", "train": {"lr": 1.0}}], "train.lr": [0.1]}},
            r"the method local sets train.lr itself, which would take precedence",
        ),
        ({"space": {}}, r"space: name at least one field"),
        ({"metric": "acuracy"}, r"no metric 'acuracy'"),
        ({"num_samples": 3}, r"no range to draw from"),
        ({"scheduler": "asha", "metric": "personalised_worst"}, r"scheduler: ends trials by a metric of each round"),
        ({"scheduler": "hyperband"}, r"scheduler"),
        ({"sampels": 3}, r"sampels: unknown key \(did you mean 'num_samples'\?\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trials_of(load_sweep({"base": BASE, "space": {"seed": [0, 1]}} | changes))


def test_draws_that_repeat_themselves_are_one_trial() -> None:
    found = points({"lora.rank": {"choice": [2, 4]}, "seed": [0, 1]}, num_samples=9)
    assert len(found) == 4
    assert {point["lora.rank"] for point in found} == {2, 4}


def test_what_was_lost_runs_again(tmp_path: Path) -> None:
    found = new(tmp_path, load_sweep({"base": BASE, "space": {"seed": [0, 1, 2]}}))
    found = found.with_result(finished("0000", 0.5)).with_result(TrialResult("0001", "lost", error="its process ended"))
    assert [trial.id for trial in found.waiting] == ["0001", "0002"]
    assert found.to_pandas().status.tolist() == ["finished", "lost", "waiting"]


def test_the_base_may_be_a_file_beside_the_sweeps(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("rounds: 7\nmethod: local\nmodel: {path: x}\ndata: {source: synthetic}\n")
    (tmp_path / "sweep.yaml").write_text("base: base.yaml\nspace: {seed: [1, 2]}\n")
    found = load_sweep(tmp_path / "sweep.yaml", {"space.seed": [3], "space.train.lr": [0.1], "base.rounds": 4})
    assert (found.base["rounds"], found.space) == (4, {"seed": [3], "train.lr": [0.1]})
    (tmp_path / "sweep.yaml").write_text("base: other.yaml\nspace: {seed: [1, 2]}\n")
    with pytest.raises(ConfigError, match=r"other.yaml: cannot be read"):
        load_sweep(tmp_path / "sweep.yaml")


def new(folder: Path, sweep: SweepConfig) -> SweepResult:
    result = SweepResult(StoragePath.of(folder), sweep, trials_of(sweep), {})
    begin(result)
    return result


def finished(id: str, value: float | None, validation: float | None = None, **more: Any) -> TrialResult:
    """Without a validation score of its own, the same as on test."""
    scores = {"personalised_mean": value, "validation_personalised_mean": value if validation is None else validation}
    return TrialResult(id, "finished", 2, scores | {"wall_seconds": 1.0}, **more)


@pytest.fixture
def found(tmp_path: Path) -> SweepResult:
    """Three learning rates with three seeds: 0.1 has 0.5, 0.7, 0.6; of 0.2 one has failed and two have 0.8, 0.9; 0.3
    has 0.4 three times."""
    sweep = load_sweep({"base": BASE, "space": {"train.lr": [0.1, 0.2, 0.3], "seed": [0, 1, 2]}})
    result = new(tmp_path, sweep)
    for number, value in enumerate((0.5, 0.7, 0.6, 0.8, 0.9, None, 0.4, 0.4, 0.4)):
        failed = TrialResult(f"{number:04d}", "failed", error="a fault")
        result = result.with_result(failed if value is None else finished(f"{number:04d}", value))
    return result


def test_over_seeds_by_hand(found: SweepResult) -> None:
    """t of 0.975 with 2 degrees of freedom is 4.302653, with 1 it is 12.706205."""
    table = found.over_seeds().set_index("train.lr")
    assert list(table.index) == [0.1, 0.3, 0.2], "those that a seed has failed come last"
    assert table.finished.tolist() == [3, 3, 2]
    assert table.seeds.tolist() == [3, 3, 3]
    row = table.loc[0.1]
    assert (row["seeds"], row["mean"], row["sd"]) == (3, pytest.approx(0.6), pytest.approx(0.1))
    assert row["low"] == pytest.approx(0.6 - 4.302653 * 0.1 / 3**0.5)
    assert row["high"] == pytest.approx(0.6 + 4.302653 * 0.1 / 3**0.5)
    row = table.loc[0.2]
    assert row["high"] == pytest.approx(0.85 + 12.706205 * 0.0707106781 / 2**0.5)


def test_one_seed_has_no_interval() -> None:
    assert np.isnan(confidence_interval(np.array([0.3]))).all()


@given(st.integers(2, 9), st.integers(0, 1000))
def test_intervals_are_those_of_the_t_test(size: int, seed: int) -> None:
    """The mean of the interval's end is just rejected at 5 %."""
    values = np.random.default_rng(seed).normal(0, 1, size)
    _, high = confidence_interval(values)
    assert stats.ttest_1samp(values, high).pvalue == pytest.approx(0.05, rel=1e-6)


def test_the_best_configuration_is_ready_for_a_run(found: SweepResult) -> None:
    found.write()
    best = load_config(found.place.local / "best.yaml")
    assert (best.train.lr, best.seed, [entry.key for entry in best.method]) == (0.1, 0, ["fedavg"])
    assert found.best is not None
    assert found.best.config == best


@pytest.mark.parametrize(("select_on", "best", "reported"), [("validation", "0001", 0.6), ("test", "0000", 0.9)])
def test_selection_is_by_validation_and_test_is_reported(
    tmp_path: Path, select_on: str, best: str, reported: float
) -> None:
    """0.1 is better on test and worse on validation: the selected rate is 0.2, with its own test score."""
    sweep = load_sweep({"base": BASE, "space": {"train.lr": [0.1, 0.2]}, "select_on": select_on})
    found = new(tmp_path, sweep).with_result(finished("0000", 0.9, 0.5)).with_result(finished("0001", 0.6, 0.7))
    assert found.best is not None
    assert found.best.id == best
    first = found.over_seeds().iloc[0]
    assert (first["mean"], first["selection"]) == (reported, 0.7 if select_on == "validation" else 0.9)


def test_a_sweep_without_validation_scores_selects_nothing(tmp_path: Path) -> None:
    """Trials of former versions have test scores only."""
    found = new(tmp_path, load_sweep({"base": BASE, "space": {"train.lr": [0.1, 0.2]}}))
    found = found.with_result(TrialResult("0000", "finished", 2, {"personalised_mean": 0.9}))
    assert found.best is None
    assert found.over_seeds()["mean"].tolist() == [0.9]


def test_less_may_be_better(tmp_path: Path) -> None:
    sweep = load_sweep({"base": BASE, "space": {"train.lr": [0.1, 0.2]}, "metric": "wall_seconds"})
    result = new(tmp_path, sweep)
    for id, seconds in (("0000", 3.0), ("0001", 2.0)):
        result = result.with_result(TrialResult(id, "finished", 2, {"wall_seconds": seconds}))
    assert result.best is not None
    assert result.best.id == "0001"
    upside_down = new(tmp_path / "b", sweep.model_copy(update={"mode": "max"}))
    for ended in result.ended.values():
        upside_down = upside_down.with_result(ended)
    assert upside_down.best is not None
    assert upside_down.best.id == "0000"


def test_what_is_on_disk_is_read_again(found: SweepResult) -> None:
    found.write()
    again = SweepResult.load(found.place)
    assert again.ended == found.ended
    assert again.trials == found.trials
    assert again.complete
    table = pd.read_parquet(found.place.local / "trials.parquet")
    pd.testing.assert_frame_equal(table, again.to_pandas())
    assert list(table.status) == ["finished"] * 5 + ["failed"] + ["finished"] * 3
    assert table.error[5] == "a fault"
    assert np.isnan(table.personalised_mean[5])


def test_values_of_several_kinds_share_a_column(tmp_path: Path) -> None:
    sweep = load_sweep({"base": BASE, "space": {"train.max_steps": [None, 5], "lora.targets": [["query"]]}})
    result = new(tmp_path, sweep)
    result.write()
    table = pd.read_parquet(tmp_path / "trials.parquet")
    assert list(table["train.max_steps"]) == ["null", "5"]
    assert list(table["lora.targets"]) == ['["query"]'] * 2


def test_a_sweep_goes_on_only_as_itself(found: SweepResult) -> None:
    found.write()
    same = found.sweep.model_copy(update={"max_concurrent": 3, "name": "other"})
    assert resumed(found.place, same).ended == found.ended
    other = load_sweep({"base": BASE | {"rounds": 3}, "space": {"train.lr": [0.1], "seed": [0]}})
    with pytest.raises(
        ConfigError,
        match=r"(?s)max_concurrent, name may differ:\n  base.rounds: stored is 2, given is 3\n.*  space.seed",
    ):
        resumed(found.place, other)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is not the folder of a sweep"):
        SweepResult.load(tmp_path)
    (tmp_path / "sweep.yaml").write_text("space: 3\n")
    with pytest.raises(StateError, match="is not the folder of a sweep"):
        SweepResult.load(tmp_path)
