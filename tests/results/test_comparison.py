"""Comparisons of runs with chosen scores: every figure by hand, what is left out, and what is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from written_runs import personalised, write_run

from fedray.errors import ComparisonError
from fedray.results.comparison import Comparison, Difference, Figures, compare
from fedray.results.run_result import RunResult


def figures_of(found: Comparison, method: str) -> Figures:
    return next(one for one in found.data_sets[0].figures if one.method == method)


def difference_of(found: Comparison, method: str, reference: str) -> Difference:
    return next(one for one in found.data_sets[0].against(reference) if one.method == method)


@pytest.fixture
def two_seeds(tmp_path: Path) -> list[RunResult]:
    """Three clients, two seeds. Differences of `fedalt` to `local`: +0.1, 0, −0.3 and +0.2, +0.2, +0.1."""
    first = {
        "local": {"a": (0.2, 0.5, 10), "b": (0.9, 0.8, 40), "c": (0.1, 0.6, 10)},
        "fedalt": {"a": (0.7, 0.6, 10), "b": (0.8, 0.8, 40), "c": (0.1, 0.3, 10)},
    }
    second = {
        "local": {"a": (0.5, 0.5, 10), "b": (0.5, 0.6, 40), "c": (0.5, 0.7, 10)},
        "fedalt": {"a": (0.5, 0.7, 10), "b": (0.9, 0.8, 40), "c": (0.5, 0.8, 10)},
    }
    return [write_run(tmp_path / "0", first), write_run(tmp_path / "1", second, seed=1)]


def test_figures_by_hand(two_seeds: list[RunResult]) -> None:
    """fedalt: means (0.6 + 0.8 + 0.3) / 3 = 0.5667 and (0.7 + 0.8 + 0.8) / 3 = 0.7667, so 0.6667 with the standard
    deviation 0.2 / √2. Worst 0.3 and 0.7: 0.5. Hurt by training: a of seed 0 (0.7 to 0.6), b of seed 1 (0.9 to 0.8),
    one of three each; b of seed 0 is equal. Worse than local: c of seed 0: (1/3 + 0) / 2. Binomial: √(0.24 / 10),
    √(0.16 / 40), √(0.21 / 10); √(0.21 / 10), √(0.16 / 40), √(0.16 / 10)."""
    found = compare(two_seeds)
    one = figures_of(found, "fedalt")
    assert one.mean == pytest.approx(2 / 3)
    assert one.sd == pytest.approx(0.2 / np.sqrt(2))
    assert one.worst == pytest.approx(0.5)
    assert math.isnan(one.bottom_decile)
    assert one.test_examples == 20
    assert one.hurt_by_training == pytest.approx(1 / 3)
    assert one.hurt_against_local == pytest.approx(1 / 6)
    errors = [0.24 / 10, 0.16 / 40, 0.21 / 10, 0.21 / 10, 0.16 / 40, 0.16 / 10]
    assert one.binomial_error == pytest.approx(np.mean(np.sqrt(errors)))
    assert math.isnan(figures_of(found, "local").hurt_against_local)
    assert (found.data_sets[0].seeds, found.data_sets[0].clients) == ((0, 1), (3, 3))


def test_differences_by_hand(two_seeds: list[RunResult]) -> None:
    """Mean differences −0.2 / 3 and 0.5 / 3: Δ = 0.05. Wins: a; a, b, c: (1/3 + 1) / 2; one tie and one loss of six. t
    of two seeds: 0.05 ± 12.7062 · s / √2 with s = 0.7 / 3 / √2. p of t for one degree of freedom: 2/π · arctan(1 / t)
    with t = 0.05 / (s / √2) = 3/7. Sign flips of differences of unequal signs: all as far as ±0.3 / 3, so p = 1."""
    one = difference_of(compare(two_seeds), "fedalt", "local")
    assert one.delta == pytest.approx(0.05)
    assert (one.win, one.tie, one.loss) == (pytest.approx(2 / 3), pytest.approx(1 / 6), pytest.approx(1 / 6))
    half = 12.7062047 * 0.7 / 3 / 2
    assert (one.t_low, one.t_high) == (pytest.approx(0.05 - half), pytest.approx(0.05 + half))
    assert one.t_p == one.t_p_holm == pytest.approx(2 / np.pi * np.arctan(7 / 3))
    assert one.sign_flip_p == one.sign_flip_p_holm == 1
    assert -0.3 <= one.low < 0.05 < one.high <= 0.2


def test_the_moment_before_local_training(two_seeds: list[RunResult]) -> None:
    """Differences +0.5, −0.1, 0 and 0, +0.4, 0: Δ = (0.4 / 3 + 0.4 / 3) / 2."""
    found = compare(two_seeds, moment="aggregated")
    assert difference_of(found, "fedalt", "local").delta == pytest.approx(0.4 / 3)
    assert figures_of(found, "fedalt").mean == pytest.approx((1.6 + 1.9) / 6)
    assert math.isnan(figures_of(found, "fedalt").hurt_by_training)
    assert figures_of(found, "fedalt").hurt_against_local == pytest.approx(1 / 6)


def test_the_order_of_runs_changes_nothing(two_seeds: list[RunResult]) -> None:
    assert compare(two_seeds).to_pandas().equals(compare(two_seeds[::-1]).to_pandas())


def test_one_seed_has_neither_t_nor_tests(two_seeds: list[RunResult]) -> None:
    found = two_seeds[0].compare()
    one = difference_of(found, "fedalt", "local")
    assert one.delta == pytest.approx(-0.2 / 3)
    assert one.low < one.delta < one.high, "clients are drawn"
    assert all(map(math.isnan, (one.t_low, one.t_high, one.t_p, one.t_p_holm, one.sign_flip_p)))
    assert found.data_sets[0].notes[0].startswith("one seed: intervals are over clients only")


def test_less_may_be_better(tmp_path: Path) -> None:
    """Perplexities: 30 is worse than 20. The worst of 10 is the largest, the bottom decile the second largest."""
    scores = personalised(
        {"local": [20.0] * 10, "fedavg": [11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0, 20.0, 30.0]}
    )
    run = write_run(tmp_path / "a", scores, task="causal_lm", **{"evaluation.metric": "perplexity"})
    found = run.compare()
    one = difference_of(found, "fedavg", "local")
    assert one.delta == pytest.approx(-3.4)
    assert (one.win, one.tie, one.loss) == (0.8, 0.1, 0.1)
    fedavg = figures_of(found, "fedavg")
    assert (fedavg.worst, fedavg.bottom_decile, fedavg.hurt_against_local) == (30, 20, 0.1)
    assert math.isnan(fedavg.binomial_error), "perplexity is no share of examples"
    assert fedavg.hurt_by_training == 1, "all were 0 before"


def test_holm_is_over_the_methods_of_a_reference(tmp_path: Path) -> None:
    """Three seeds, two methods against local: p of scipy's paired t test, the smaller one twice."""
    values = {0: [0.5, 0.7, 0.55], 1: [0.4, 0.65, 0.5], 2: [0.45, 0.62, 0.4]}
    runs = [
        write_run(
            tmp_path / str(seed), personalised({"local": [a] * 2, "fedavg": [b] * 2, "fedalt": [c] * 2}), seed=seed
        )
        for seed, (a, b, c) in values.items()
    ]
    found = compare(runs)
    local, fedavg, fedalt = zip(*values.values(), strict=True)
    p_values = [stats.ttest_rel(other, local).pvalue for other in (fedavg, fedalt)]
    assert [one.t_p for one in found.data_sets[0].against("local")] == pytest.approx(p_values)
    smaller = 2 * min(p_values)
    assert [one.t_p_holm for one in found.data_sets[0].against("local")] == pytest.approx(
        [smaller, max(smaller, max(p_values))]
    )
    assert found.references == ("local", "fedavg")
    assert [one.method for one in found.data_sets[0].against("fedavg")] == ["local", "fedalt"]


def test_methods_of_several_runs_with_one_seed_are_compared(tmp_path: Path) -> None:
    """A method that two runs have with the same bits counts once."""
    one = write_run(tmp_path / "1", personalised({"local": [0.5, 0.6], "fedavg": [0.6, 0.8]}))
    two = write_run(tmp_path / "2", personalised({"local": [0.5, 0.6], "fedalt": [0.7, 0.7]}))
    found = compare([one, two])
    assert [one.method for one in found.data_sets[0].figures] == ["local", "fedavg", "fedalt"]
    assert difference_of(found, "fedalt", "fedavg").delta == pytest.approx(0)
    assert found.data_sets[0].seeds == (0,)


def test_clients_without_test_examples_and_undefined_scores_are_left_out_and_said(tmp_path: Path) -> None:
    """c has no test examples. The score of b is undefined for fedavg, infinite for fedalt: only a and d are paired."""
    scores = {
        "local": {"a": (0.0, 0.5, 4), "b": (0.0, 0.1, 4), "c": (0.0, None, 0), "d": (0.0, 0.3, 4)},
        "fedavg": {"a": (0.0, 0.7, 4), "b": (0.0, math.nan, 4), "c": (0.0, 0.9, None), "d": (0.0, 0.4, 4)},
        "fedalt": {"a": (0.0, 0.6, 4), "b": (0.0, math.inf, 4), "c": (0.0, 0.9, 0)},
    }
    found = write_run(tmp_path / "a", scores).compare()
    assert figures_of(found, "local").mean == pytest.approx(0.3)
    assert figures_of(found, "fedavg").mean == pytest.approx(0.55)
    assert difference_of(found, "fedavg", "local").delta == pytest.approx((0.2 + 0.1) / 2)
    assert difference_of(found, "fedalt", "local").delta == pytest.approx(0.1)
    assert found.data_sets[0].clients == (3, 3)
    assert found.data_sets[0].notes[1:] == (
        "without test examples, and left out: c",
        "fedavg: 1 of 3 scores are undefined or missing, and left out of its figures and differences: b (seed 0)",
        "fedalt: 2 of 3 scores are undefined or missing, and left out of its figures and differences: b (seed 0), "
        "d (seed 0)",
    )


def test_a_method_that_has_not_finished_is_named(tmp_path: Path) -> None:
    scores = personalised({"local": [0.5], "fedavg": [0.6]})
    found = write_run(tmp_path / "a", scores, method=["local", "fedavg", "fedalt"]).compare()
    assert found.notes == (f"{tmp_path / 'a'}: not finished, and left out: fedalt",)


# ---------------------------------------------------------------- data sets


def several_data_sets(folder: Path, means: list[tuple[float, float, float]]) -> list[RunResult]:
    """Return a run for each data set, with the scores of local, fedavg and fedalt; two clients score alike."""
    return [
        write_run(
            folder / f"data{i}",
            personalised({"local": [a] * 2, "fedavg": [b] * 2, "fedalt": [c] * 2}),
            data=f"data{i}",
            **{"data.examples_per_client": 10 + i, "name": f"data{i}"},
        )
        for i, (a, b, c) in enumerate(means)
    ]


def test_ranks_over_six_data_sets_by_hand(tmp_path: Path) -> None:
    """fedalt is always first; local and fedavg are second three times each: mean ranks 1, 2.5, 2.5. Friedman:
    12 · 6 / (3 · 4) · (1 + 0.25 + 0.25) = 9 with 2 degrees of freedom: p = exp(−4.5). Critical difference
    2.3437 · √(12 / 36) = 1.3531, less than 1.5: local and fedavg are one group. Wilcoxon of six differences of one sign
    is 2 / 64, Holm doubles it; fedavg's differences +1, −1, +1, −1, ... are of equal size, so p = 1."""
    means = [(0.1, 0.2, 0.5 + i / 100) if i % 2 else (0.2, 0.1, 0.5 + i / 100) for i in range(6)]
    found = compare(several_data_sets(tmp_path, means))
    ranks = found.ranks
    assert ranks is not None
    assert ranks.methods == ("fedalt", "local", "fedavg")
    assert ranks.mean_ranks == (1, 2.5, 2.5)
    assert ranks.friedman_p == pytest.approx(np.exp(-4.5))
    assert ranks.critical_difference == pytest.approx(1.3531, abs=1e-4)
    assert ranks.groups == (("local", "fedavg"),)
    assert ranks.wilcoxon_p_holm == {"fedavg": pytest.approx(1), "fedalt": pytest.approx(4 / 64)}
    assert [one.name for one in found.data_sets] == [f"data{i}" for i in range(6)]


def test_a_few_data_sets_have_ranks_without_tests(tmp_path: Path) -> None:
    found = compare(several_data_sets(tmp_path, [(0.1, 0.2, 0.3), (0.1, 0.3, 0.2)]))
    ranks = found.ranks
    assert ranks is not None
    assert (ranks.methods, ranks.mean_ranks) == (("fedavg", "fedalt", "local"), (1.5, 1.5, 3))
    assert math.isnan(ranks.critical_difference)
    assert (ranks.groups, dict(ranks.wilcoxon_p_holm)) == ((), {})
    assert compare(several_data_sets(tmp_path / "one", [(0.1, 0.2, 0.3)])).ranks is None


def test_data_sets_of_one_name_are_named_by_what_differs(tmp_path: Path) -> None:
    scores = personalised({"local": [0.5], "fedavg": [0.6]})
    runs = [
        write_run(tmp_path / str(i), scores, data=str(i), **{"data.examples_per_client": count})
        for i, count in enumerate((7, 9))
    ]
    names = [one.name for one in compare(runs).data_sets]
    assert names == ["run (data.examples_per_client=7)", "run (data.examples_per_client=9)"]


def test_data_sets_have_names_of_their_own(tmp_path: Path) -> None:
    """Only two settings are in a name; data sets that differ in a third are numbered."""
    scores = personalised({"local": [0.5], "fedavg": [0.6]})
    varied = [(7, 20, 0.1), (9, 30, 0.1), (9, 30, 0.2)]
    runs = [
        write_run(
            tmp_path / str(i),
            scores,
            data=str(i),
            **{"data.examples_per_client": count, "data.max_length": length, "partition.test_fraction": share},
        )
        for i, (count, length, share) in enumerate(varied)
    ]
    names = [one.name for one in compare(runs).data_sets]
    assert len(set(names)) == 3
    assert names[2] == f"{names[1]}, data set 3"


def test_identical_data_are_one_data_set_however_they_are_written(tmp_path: Path) -> None:
    one = write_run(tmp_path / "1", personalised({"local": [0.5], "fedavg": [0.6]}))
    two = write_run(tmp_path / "2", personalised({"fedalt": [0.5]}), **{"data.cache_dir": "/elsewhere"})
    three = write_run(tmp_path / "3", personalised({"fedreft": [0.5]}), **{"data.text": "sentence"})
    assert len(compare([one, two, three]).data_sets) == 1


# ---------------------------------------------------------------- what is refused


BOTH = personalised({"local": [0.5, 0.6], "fedavg": [0.6, 0.7]})
OTHER = personalised({"fedalt": [0.6, 0.7]})


@pytest.mark.parametrize(
    ("fields", "differ", "line"),
    [
        ({"rounds": 3}, "budgets", "rounds: 2 and 3"),
        ({"train.epochs": 2}, "budgets", "train.epochs: 1.0 and 2.0"),
        ({"train.max_steps": 7}, "budgets", "train.max_steps: None and 7"),
        ({"train.batch_size": 4}, "budgets", "train.batch_size: 8 and 4"),
        ({"train.accumulation": 2, "rounds": 3}, "budgets", "train.accumulation: 1 and 2"),
        ({"clients.per_round": 2}, "cohorts", "clients.per_round: None and 2"),
        ({"clients.tiers": {"weak": {"share": 1, "speed": 0.5}}}, "cohorts", "clients.tiers.weak.speed: None and 0.5"),
        ({"evaluation.metric": "matthews"}, "metrics", "evaluation.metric: 'accuracy' and 'matthews'"),
        ({"model.dtype": "bfloat16"}, "base models", "model.dtype: 'float32' and 'bfloat16'"),
        ({"clients.per_round": 2, "rounds": 3}, "budgets and cohorts", "rounds: 2 and 3"),
    ],
)
def test_runs_with_other_settings_are_not_comparable(
    tmp_path: Path, fields: dict[str, Any], differ: str, line: str
) -> None:
    runs = [write_run(tmp_path / "a", BOTH), write_run(tmp_path / "b", OTHER, **fields)]
    with pytest.raises(ComparisonError) as refused:
        compare(runs)
    first, *lines = str(refused.value).splitlines()
    a, b = tmp_path / "a", tmp_path / "b"
    assert first == f"not comparable: different {differ}: local with seed 0 in {a} and fedalt with seed 0 in {b} have"
    assert f"  {line}" in lines


def test_what_is_tuned_for_each_method_may_differ(tmp_path: Path) -> None:
    tuned = {"train.lr": 0.1, "train.optimizer": "sgd", "lora.rank": 2, "clients.num_cpus": 2, "runtime": "inline"}
    found = compare([write_run(tmp_path / "a", BOTH), write_run(tmp_path / "b", OTHER, **tuned)])
    assert difference_of(found, "fedalt", "fedavg").delta == pytest.approx(0)


def test_a_budget_of_one_method_is_seen_within_a_run(tmp_path: Path) -> None:
    entries = ["local", {"name": "fedavg", "train": {"epochs": 2}}]
    with pytest.raises(ComparisonError, match=r"different budgets: (?s:.*)train.epochs: 1.0 and 2.0"):
        write_run(tmp_path / "a", BOTH, method=entries).compare()


def test_other_data_are_not_comparable(tmp_path: Path) -> None:
    here = write_run(tmp_path / "a", BOTH)
    changed = write_run(tmp_path / "b", OTHER, data="changed")
    with pytest.raises(
        ComparisonError, match=r"different data with seed 0: data_sha256 is data-0 in .*a, and changed-0"
    ):
        compare([here, changed])
    there = write_run(tmp_path / "c", OTHER, data="other", **{"data.examples_per_client": 5})
    with pytest.raises(ComparisonError, match=r"different data: .*c has only fedalt(?s:.*)examples_per_client: 5 and "):
        compare([here, there])


def test_missing_seeds_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "0", BOTH), write_run(tmp_path / "1", BOTH, seed=1)]
    runs += [write_run(tmp_path / "2", OTHER), write_run(tmp_path / "3", BOTH, seed=3)]
    with pytest.raises(ComparisonError, match=r"the same seeds \(0, 1, 3\):\n  fedalt lacks seed 1, 3"):
        compare(runs)
    assert compare(runs, methods=["local", "fedavg"]).data_sets[0].seeds == (0, 1, 3)
    assert len(compare(runs, seeds=[0]).data_sets[0].figures) == 3


def test_a_method_twice(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "0", BOTH), write_run(tmp_path / "1", BOTH, state="other", **{"train.lr": 0.1})]
    with pytest.raises(ComparisonError, match=r"local with seed 0 is in .* and in .*, with different (?s:.*)train.lr"):
        compare(runs)


def test_a_method_that_differs_between_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "0", BOTH), write_run(tmp_path / "1", BOTH, seed=1, **{"train.lr": 0.1})]
    with pytest.raises(
        ComparisonError, match=r"is another method than local with seed 1 (?s:.*)train.lr: 0.0005 and 0.1"
    ):
        compare(runs)


def test_one_method_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="only fedalt has finished; a comparison needs several methods"):
        write_run(tmp_path / "0", OTHER).compare()


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="nothing to compare"):
        compare([])
    runs = [write_run(tmp_path / "0", BOTH), write_run(tmp_path / "1", OTHER, seed=1)]
    with pytest.raises(ComparisonError, match="nothing to compare: no run of these methods and seeds has finished"):
        compare(runs, methods=["fedalt"], seeds=[0])


def test_data_sets_without_a_common_method(tmp_path: Path) -> None:
    one = write_run(tmp_path / "1", BOTH, data="1", name="one", **{"data.examples_per_client": 5})
    two = write_run(tmp_path / "2", personalised({"fedalt": [0.1], "fedreft": [0.2]}), data="2", name="two")
    message = "no method is on all data sets: one has local, fedavg; two has fedalt, fedreft"
    with pytest.raises(ComparisonError, match=message):
        compare([one, two])


def test_a_moment_that_was_not_measured(tmp_path: Path) -> None:
    scores = {"local": {"a": (None, 0.5, 4)}, "fedavg": {"a": (0.3, 0.6, 4)}}
    run = write_run(tmp_path / "0", scores)
    with pytest.raises(ComparisonError, match="local with seed 0 in .*0 has no aggregated score of any client"):
        run.compare(moment="aggregated")
    assert math.isnan(figures_of(run.compare(), "local").hurt_by_training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"references": "fedavgg"},
            r"reference: no method 'fedavgg' \(did you mean 'fedavg'\?\); run has local, fedavg",
        ),
        ({"moment": "personalized"}, r"moment: no 'personalized' \(did you mean 'personalised'\?\)"),
        ({"methods": ["scaffold"]}, r"method: no 'scaffold'; the runs have local, fedavg"),
        ({"seeds": [7]}, r"seed: no 7; the runs have 0"),
    ],
)
def test_names_that_are_not_there(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare([write_run(tmp_path / "0", BOTH)], **options)


def test_without_the_usual_references_the_first_method_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", personalised({"fedalt": [0.5], "fedreft": [0.6]}))
    assert run.compare().references == ("fedalt",)
    assert run.compare(reference="fedreft").references == ("fedreft",)
