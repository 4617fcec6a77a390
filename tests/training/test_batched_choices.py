"""Options of clients that are evaluated in one step, against the same clients one by one."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from members import CLIENTS, alone, first_values, fused

from fedray.adapters.reft import attach_reft
from fedray.config import EvaluationConfig, ReftSection
from fedray.config.metric import METRICS
from fedray.data.shards import CHOICE, CHOICES, Shard
from fedray.evaluation.metrics.multiple_choice import MultipleChoice


class MeanLikelihood(MultipleChoice):
    """The mean log-likelihood of the first options less that of the last ones: every one of them changes it."""

    name = "mean_likelihood"

    def compute(self, likelihoods, options, right):
        return float(np.mean([own[0] - own[-1] for own in likelihoods]))


def with_options(table, seed):
    """Return the table with two to four options of one to four tokens for every example."""
    rng = np.random.default_rng(seed)
    rows = []
    for ids in table["input_ids"].to_pylist():
        tokens = [rng.integers(3, 30, rng.integers(1, 5)).tolist() for _ in range(rng.integers(2, 5))]
        rows.append(
            [
                {"input_ids": ids + own, "start": len(ids), "text": f"{i}", "right": i == 0}
                for i, own in enumerate(tokens)
            ]
        )
    return table.append_column(CHOICES, pa.array(rows, pa.list_(CHOICE)))


@pytest.mark.parametrize("kind", ["lora", "reft"])
def test_fused_clients_rank_options_as_alone(adapt, locals_of, kind):
    """Members have other numbers of examples and options; cid's test split is empty, dee's validation has none."""
    adapter = adapt("causal_lm")
    if kind == "reft":
        adapter = attach_reft(adapter.model, ReftSection(rank=2, positions="f1+l1", dropout=0.0), seed=4)
    evaluation = EvaluationConfig(batch_size=3, metrics=(MeanLikelihood(), METRICS.parse("multiple_choice")))
    locals_ = locals_of(adapter, "causal_lm", measure=True, lr=0.01, batch_size=2)
    for number, (name, local) in enumerate(locals_.items()):
        tables = local._shard.tables
        few = tables["test"].slice(0, 0 if name == "cid" else 6 - number)
        changed = {"test": with_options(few, number), "validation": with_options(tables["validation"], number + 9)}
        local._shard = Shard(name, {**tables, **changed})
        local._training_context = replace(local._training_context, evaluation=evaluation)
        local._backend = replace(local._backend, training_context=local._training_context)
    values = {name: first_values(adapter, name) for name in CLIENTS}
    expected, ours = alone(adapter, locals_, values), fused(adapter, locals_, values)
    seen = []
    for name, (_, report) in ours.items():
        for moment in ("aggregated", "personalised"):
            for examples in ("test", "validation"):
                one, same = (r.evaluation(moment, examples).metrics for r in (report, expected[name][1]))
                assert one == pytest.approx(same, rel=1e-4, abs=1e-5, nan_ok=True)
                seen.append(one["mean_likelihood"])
    assert len({round(value, 3) for value in seen if value == value}) == 14
