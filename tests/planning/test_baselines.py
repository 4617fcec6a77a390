"""What every baseline trains and sends on three models, against one table of exact counts; papers print rounded ones.

A client's second round; carried sums have five clients' columns. With r = 32 on all seven linear
layers of Llama-3.2-3B, A has a = 23,855,104 numbers and B b = 24,772,608; with r = 8 on query and value, a = b =
2,097,152 of Llama-2-7B, and 393,216 of RoBERTa-large, whose head has h = 1,051,650.

Llama-3.2-3B has no head, so its numbers are 28 times those of a layer. FFA-LoRA and FedSA-LoRA, which show a and b, are
counted on all 28 layers, and the other methods on four.
"""

from typing import Any

import pytest
from every_method import entry
from paper_models import LLAMA_2_7B, LLAMA_3_2_3B, ROBERTA_LARGE

from fedray.config import load_config
from fedray.experiment.prepare import split_labels
from fedray.methods.registry import METHODS
from fedray.models.architecture import architecture
from fedray.planning.accounting import method_cost
from fedray.planning.costs import attached
from fedray.types import Client

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3B": (
        LLAMA_3_2_3B,
        {"rank": 32, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "7B": (LLAMA_2_7B, {"rank": 8}),
    "RoBERTa": (ROBERTA_LARGE, {"rank": 8}),
}
"""A model and the section `lora`."""

TABLE = """
fedit              48,627,712  48,627,712  48,627,712  4,194,304  4,194,304  4,194,304 1,838,082 1,838,082 1,838,082
ffa_lora           24,772,608  24,772,608  24,772,608  2,097,152  2,097,152  2,097,152 1,444,866 1,444,866 1,444,866
fedsa_lora         48,627,712  23,855,104  23,855,104  4,194,304  2,097,152  2,097,152 1,838,082   393,216   393,216
fedsa_lora:shared  48,627,712  23,855,104  23,855,104  4,194,304  2,097,152  2,097,152 1,838,082 1,444,866 1,444,866
flora              48,627,712 243,138,560  48,627,712  4,194,304 20,971,520  4,194,304 1,838,082 4,983,810 1,838,082
fedex_lora         48,627,712 243,138,560  48,627,712  4,194,304 20,971,520  4,194,304 1,838,082 4,983,810 1,838,082
rolora             23,855,104  48,627,712  23,855,104  2,097,152  4,194,304  2,097,152 1,444,866 1,838,082 1,444,866
fedsvd             24,772,608  48,627,712  24,772,608  2,097,152  4,194,304  2,097,152 1,444,866 1,838,082 1,444,866
fed_plora          24,313,856  48,627,712  24,313,856  2,097,152  4,194,304  2,097,152 1,444,866 1,838,082 1,444,866
fed_sb              2,822,400   2,822,400   2,822,400    921,600    921,600    921,600 1,742,850 1,742,850 1,742,850
scaffold           48,627,712  97,255,424  97,255,424  4,194,304  8,388,608  8,388,608 1,838,082 3,676,164 3,676,164
ifca               48,627,712 145,883,136  48,627,712  4,194,304 12,582,912  4,194,304 1,838,082 5,514,246 1,838,082
feddpa             97,255,424  48,627,712  48,627,712  8,388,608  4,194,304  4,194,304 2,624,514 1,838,082 1,838,082
pf2lora            51,666,944  48,627,712  48,627,712  5,242,880  4,194,304  4,194,304 2,034,690 1,838,082 1,838,082
fedper             48,627,712  48,627,712  48,627,712  4,194,304  4,194,304  4,194,304 1,838,082   786,432   786,432
fedbabu            48,627,712  48,627,712  48,627,712  4,194,304  4,194,304  4,194,304   786,432   786,432   786,432
fedtreelora        48,627,908  97,255,424  48,627,712  4,194,368  8,388,608  4,194,304 1,838,130 2,624,514 1,838,082
fedalt             50,118,656  48,627,712  48,627,712  4,718,592  4,194,304  4,194,304 1,936,386 1,838,082 1,838,082
"""
"""Trained, down, up on each model. RoLoRA's second round is one of A; a round of B has B's numbers. Where there is no
head, FedPer is FedIT, and is refused."""

ALIKE = {
    "fedit": (
        "fedavg",
        "fedprox",
        "ditto",
        "hetlora",
        "flexlora",
        "lora_fair",
        "flora_na",
        "fdlora",
    ),
    "fedper": ("fedrep",),
}
"""Methods whose counts are those of another one."""

OPTIONS: dict[str, dict[str, Any]] = {
    "fedsa_lora:shared": {"head": "shared"},
    "flora": {"carried_rank": 1000},
    "fedex_lora": {"carried_rank": 1000},
    "ifca": {"clusters": 3},
    "fed_sb": {"lora": {"rank": 120}},
    "fedtreelora": {"warmup_rounds": 1, "clusters": 2},
}
"""Hyperparameters with which a row counts; by default a method has its own."""

HEAD_NEEDED = {"fedper", "fedrep", "fedbabu"}

CARRYING = {"flora", "fedex_lora"}
"""Methods whose downlink grows with the cohort; of others two clients show as much as five."""


def rows() -> list[Any]:
    found = []
    for line in TABLE.strip().splitlines():
        name, *numbers = line.split()
        counts = [int(number.replace(",", "")) for number in numbers]
        for method in (name, *ALIKE.get(name, ())):
            for index, model in enumerate(MODELS):
                if method not in HEAD_NEEDED or model == "RoBERTa":
                    counted = tuple(counts[3 * index : 3 * index + 3])
                    found.append(pytest.param(method, model, counted, id=f"{method}-{model}"))
    return found


@pytest.mark.parametrize(("row", "model", "expected"), rows())
def test_counts_of_the_baselines(row: str, model: str, expected: tuple[int, int, int]) -> None:
    name = row.partition(":")[0]
    if name not in METHODS.names:
        pytest.skip(f"{name} is not a method yet")
    section, lora = MODELS[model]
    parts = 7 if model == "3B" and name not in ("ffa_lora", "fedsa_lora") else 1
    if parts > 1:
        section = section | {"num_hidden_layers": section["num_hidden_layers"] // parts}
    tiers = {"half": {"share": 1.0, "lora_rank": lora["rank"] // 2}} if name == "fed_plora" else {}
    config = load_config(
        {
            "rounds": 2,
            "task": "classification" if "num_labels" in section else "causal_lm",
            "method": entry(name, **OPTIONS.get(row, {})),
            "model": {"path": "random", "tokenizer": "bytes", "config": section},
            "data": {"source": "synthetic"},
            "clients": {"tiers": tiers},
            "lora": lora,
        }
    )
    (tier,) = config.clients.tier_names
    without_labels, num_labels = split_labels(config)
    arch = architecture(without_labels, config.task, num_labels or 1, None, None)
    whole = attached(config, arch, config.method[0], None)
    held = attached(config, arch, config.method[0], tier) if tiers else whole
    capacity = config.clients.tier(tier).capacity
    number = 5 if name in CARRYING else 2
    cost = method_cost(whole, held, [Client(f"client_{k}", k, 5, tier, capacity) for k in range(number)])
    assert (parts * cost.trainable, parts * cost.downlink, parts * cost.uplink) == expected
