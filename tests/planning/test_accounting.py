"""What methods train and send, against formulas written here and the figures of the papers."""

import tracemalloc
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from paper_models import BERT_LARGE, LLAMA_2_7B, LLAMA_3_2_3B, LLAMA_3_8B, ROBERTA_LARGE

import fedray.planning.costs
from fedray.config import load_config
from fedray.errors import ConfigError
from fedray.experiment.outline import costs_from_configuration
from fedray.methods.registry import build_method
from fedray.models.architecture import architecture
from fedray.models.backbone import meta_backbone
from fedray.planning.accounting import Attached, Cost, method_cost
from fedray.types import Client

D, LAYERS, FFN, VOCABULARY, POSITIONS, CLASSES = 16, 2, 24, 50, 40, 3
TINY = {
    "model_type": "bert",
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "num_labels": CLASSES,
}
BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "num_labels": 2}


def cost(model: dict[str, Any], method: Any, **changes: Any) -> Cost:
    """What `fedray params` prints for one method, from a configuration alone."""
    (found,) = costs(model, method, **changes).values()
    return found


def costs(model: dict[str, Any], method: Any, **changes: Any) -> Mapping[str, Cost]:
    """The same by tier."""
    base = {
        "rounds": 1,
        "task": "classification" if "num_labels" in model else "causal_lm",
        "method": method,
        "model": {"path": "random", "tokenizer": "bytes", "config": model},
        "data": {"source": "synthetic"},
        "lora": {"rank": 2},
        "reft": {"rank": 2},
    }
    config = load_config(base, {path.replace("__", "."): value for path, value in changes.items()})
    (by_tier,) = costs_from_configuration(config).values()
    return by_tier


# ---------------------------------------------------------------- figures of the papers


@pytest.mark.parametrize(
    ("model", "method", "section", "by_hand", "figure"),
    [
        # blocks · {prefix, suffix} · (R and W: 2·r·d, b: r)
        (LLAMA_3_2_3B, "fedreft", {"reft": {"rank": 8}}, 28 * 2 * (2 * 8 * 3072 + 8), 2_752_960),
        (LLAMA_3_2_3B, "fedreft", {"reft": {"rank": 32}}, 28 * 2 * (2 * 32 * 3072 + 32), 11_011_840),
        (LLAMA_3_8B, "fedreft", {"reft": {"rank": 8}}, 32 * 2 * (2 * 8 * 4096 + 8), 4_194_816),
        # layers · r · (d_in + d_out): q and v, dense d², and out
        (
            ROBERTA_LARGE,
            "fedavg",
            {"lora": {"rank": 8}},
            24 * 2 * 8 * 2048 + 1024 * 1024 + 1024 + 2 * 1024 + 2,
            1_838_082,
        ),
    ],
)
def test_the_table_of_the_papers(
    model: dict[str, Any], method: str, section: dict[str, Any], by_hand: int, figure: int
) -> None:
    """2.75, 11.01, 4.19 and 1.83 million in the paper; what trains is what travels, up and down."""
    found = cost(model, method, **section)
    assert by_hand == figure
    assert (found.trainable, found.uplink, found.downlink) == (figure, figure, figure)
    assert (found.uplink_bytes, found.downlink_bytes) == (4 * figure, 4 * figure)


def test_fedit_on_llama_3_2_3b_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA r = 32 on all seven linear layers: r · (d_in + d_out) for q and o (3072 each way), k and v (3072 to 1024),
    gate, up and down (3072 and 8192), in 28 layers: 48,627,712, 48.63 million in the paper. Two clients' vectors side
    by side, their float64 sum and one summand of it are 24 bytes per number, 1.17 GB."""
    by_hand = 28 * 32 * (2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192))
    assert by_hand == 48_627_712
    peaks = []

    def traced(*args: Any) -> Cost:
        tracemalloc.start()
        try:
            return method_cost(*args)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(fedray.planning.costs, "method_cost", traced)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = cost(LLAMA_3_2_3B, "fedavg", lora={"rank": 32, "targets": targets})
    assert (found.trainable, found.uplink, found.downlink) == (by_hand, by_hand, by_hand)
    assert max(peaks) < 1.4e9


def test_fedalt_on_llama_2_7b() -> None:
    """r = 8 on q and v: 32·2·8·8192 = 4,194,304 and the mixer's 32·2·2·4096 = 524,288 train: 4,718,592. The total has
    the Rest-of-World LoRA too: 6,738,415,616 + 2 · 4,194,304 + 524,288, of which they are 0.0699 %. L travels up and R
    down; the mixer never."""
    base = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    found = cost(LLAMA_2_7B, "fedalt", lora={"rank": 8})
    assert base == 6_738_415_616
    assert (found.trainable, found.total) == (4_718_592, 6_747_328_512)
    assert found.total == base + 2 * 4_194_304 + 524_288
    assert (found.uplink, found.downlink) == (4_194_304, 4_194_304)
    assert found.head == "-"


def bert_parameters(model: dict[str, Any], d: int, layers: int, ffn: int, vocabulary: int, positions: int) -> int:
    """Embeddings with their norm, per layer four d x d with bias, two norms and the feed-forward, pooler, head."""
    embeddings = (vocabulary + positions + 2) * d + 2 * d
    layer = 4 * (d * d + d) + 2 * 2 * d + d * ffn + ffn + ffn * d + d
    return embeddings + layers * layer + d * d + d + model["num_labels"] * (d + 1)


@cache
def full_cost(large: bool) -> Cost:
    """Return what full fine-tuning of BERT-large or BERT-base costs."""
    return cost(BERT_LARGE if large else BERT_BASE, {"name": "fedavg", "adapter": "full"})


@pytest.mark.parametrize(
    ("model", "size", "rho", "ratio", "timing"),
    [
        (BERT_BASE, (768, 12, 3072), 1.0, 92.7, "post"),
        (BERT_BASE, (768, 12, 3072), 0.5, 123.5, "post"),
        (BERT_BASE, (768, 12, 3072), 0.5, 123.5, "pre"),
        (BERT_LARGE, (1024, 24, 4096), 1.0, 106.5, "post"),
        (BERT_LARGE, (1024, 24, 4096), 0.5, 141.9, "post"),
    ],
)
def test_fedhfts_communication_against_full_fine_tuning(
    model: dict[str, Any], size: tuple[int, int, int], rho: float, ratio: float, timing: str
) -> None:
    """All of the model's parameters, head included, over the numbers that a client of FedHFT sends up: r = 32 on query
    and value, A whole and the share ρ of B's rows, the head. The bitsets are no numbers; they add one bit per row."""
    d, layers, ffn = size
    config = {"clients__tiers": {"all": {"share": 1, "mask_ratio": rho}}, "lora__rank": 32}
    found = cost(model, {"name": "fedhft", "timing": timing}, **config)
    base = bert_parameters(model, d, layers, ffn, 30522, 512)
    up = layers * 2 * (32 * d + int(rho * d) * 32) + 2 * (d + 1)
    assert found.uplink == up
    assert found.uplink_bytes == 4 * up + (0 if rho == 1 else layers * 2 * d // 8)
    assert round(base / up, 1) == ratio
    everything = full_cost(model is BERT_LARGE)
    assert (everything.trainable, everything.uplink, everything.downlink, everything.total) == (base,) * 4
    assert found.total == base + 2 * (layers * 2 * 32 * 2 * d)  # both branches
    assert found.trainable == (up if timing == "pre" else layers * 2 * 32 * 2 * d + 2 * (d + 1))


# ---------------------------------------------------------------- every method on a tiny BERT

LORA = LAYERS * 2 * 2 * (D + D)
"""q and v, r = 2: 256."""
REFT = LAYERS * 2 * (2 * 2 * D + 2)
"""Prefix and suffix, r = 2: 264."""
MIXER = LAYERS * 2 * 2 * D
HEAD = CLASSES * (D + 1)
BASE = bert_parameters(TINY, D, LAYERS, FFN, VOCABULARY, POSITIONS)


@pytest.mark.parametrize(
    ("method", "changes", "trainable", "adapter", "up", "down", "head"),
    [
        ("local", {}, LORA + HEAD, LORA, 0, 0, "local"),
        ("local", {"head": "frozen_label_text"}, LORA, LORA, 0, 0, "frozen_label_text"),
        ({"name": "local", "adapter": "reft"}, {}, REFT + HEAD, REFT, 0, 0, "local"),
        ("head_only", {}, LORA + HEAD, LORA, HEAD, HEAD, "shared"),
        ("head_only", {"head": "local"}, LORA + HEAD, LORA, HEAD, HEAD, "shared"),
        ("fedavg", {}, LORA + HEAD, LORA, LORA + HEAD, LORA + HEAD, "shared"),
        ("fedavg", {"head": "local"}, LORA + HEAD, LORA, LORA, LORA, "local"),
        ({"name": "fedavg", "head": "frozen_label_text"}, {}, LORA, LORA, LORA, LORA, "frozen_label_text"),
        ("fedavg", {"head": "frozen_random"}, LORA, LORA, LORA, LORA, "frozen_random"),
        ({"name": "fedavg", "adapter": "reft"}, {}, REFT + HEAD, REFT, REFT + HEAD, REFT + HEAD, "shared"),
        ("fedprox", {}, LORA + HEAD, LORA, LORA + HEAD, LORA + HEAD, "shared"),
        ("ditto", {}, LORA + HEAD, LORA, LORA + HEAD, LORA + HEAD, "shared"),
        ("scaffold", {}, LORA + HEAD, LORA, 2 * (LORA + HEAD), 2 * (LORA + HEAD), "shared"),
        ("rolora", {}, LORA // 2 + HEAD, LORA, LORA // 2 + HEAD, LORA + HEAD, "shared"),  # A's round; B is as large
        ("fedrep", {}, LORA + HEAD, LORA, LORA, LORA, "local"),
        ("fedbabu", {}, LORA, LORA, LORA, LORA, "frozen_random"),
        ("fedreft", {}, REFT + HEAD, REFT, REFT + HEAD, REFT + HEAD, "shared"),
        ({"name": "fedreft", "align": "procrustes"}, {}, REFT + HEAD, REFT, REFT + HEAD, REFT + HEAD, "shared"),
        ({"name": "fedreft", "share": "rotation"}, {}, REFT + HEAD, REFT, 128 + HEAD, 128 + HEAD, "shared"),
        ({"name": "fedreft", "share": "source"}, {}, REFT + HEAD, REFT, 136 + HEAD, 136 + HEAD, "shared"),
        ("fedreft", {"reft.kind": "noreft"}, REFT + HEAD, REFT, REFT + HEAD, REFT + HEAD, "shared"),
        ("fedreft", {"reft.tie_positions": True}, REFT // 2 + HEAD, REFT // 2, 183, 183, "shared"),
        ("fedalt", {}, LORA + MIXER + HEAD, 2 * LORA + MIXER, LORA + HEAD, LORA + HEAD, "shared"),
        ({"name": "fedalt", "mixer": "none"}, {}, LORA + HEAD, 2 * LORA, LORA + HEAD, LORA + HEAD, "shared"),
        ("fedhft", {}, LORA + HEAD, 2 * LORA, LORA + HEAD, LORA + HEAD + 2, "shared"),
        ({"name": "fedhft", "clusters": 5}, {}, LORA + HEAD, 2 * LORA, LORA + HEAD, LORA + HEAD + 5, "shared"),
        (
            {"name": "fedhft", "downlink_rank": 6, "warmup_rounds": 0},
            {},
            LORA + HEAD,
            4 * LORA,
            LORA + HEAD,
            3 * LORA + HEAD + 2,
            "shared",
        ),
        ({"name": "fedhft", "server_state": "rank_q"}, {"head": "local"}, 307, 512, LORA, LORA + 2, "local"),
    ],
)
def test_every_method_by_hand(
    method: Any, changes: dict[str, Any], trainable: int, adapter: int, up: int, down: int, head: str
) -> None:
    """LoRA 256, LoReFT 264 (R: 4·2·16 = 128, W and b: 136), mixer 128, head 51. FedHFT's downlink has π, and its
    mixture at `downlink_rank`; its second branch has that rank too."""
    found = cost(TINY, method, **changes)
    assert found == Cost(trainable, BASE + adapter, up, down, 4 * up, 4 * down, head)


def test_bfloat16_halves_what_travels_but_not_its_numbers() -> None:
    """π stays float32: two numbers."""
    wide, narrow = (cost(TINY, {"name": "fedhft", "wire": wire}) for wire in ("float32", "bfloat16"))
    assert (narrow.uplink, narrow.downlink) == (wide.uplink, wide.downlink)
    assert 2 * narrow.uplink_bytes == wide.uplink_bytes
    assert 2 * (narrow.downlink_bytes - 8) == wide.downlink_bytes - 8


def test_methods_that_only_have_tokens_have_no_head() -> None:
    """q and v of a causal model with 3 key-value heads of 4: 2 layers · 2·((24 + 24) + (24 + 12))."""
    model = {
        "model_type": "llama",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "intermediate_size": 8,
        "vocab_size": 30,
    }
    found = cost(model, "fedavg")
    assert (found.trainable, found.uplink, found.head) == (2 * 2 * (48 + 36), 2 * 2 * (48 + 36), "-")
    with pytest.raises(ConfigError, match="method head_only: needs a task head"):
        cost(model, "head_only")


def test_every_tier_is_counted() -> None:
    """Under `pre` ρ = 0.5 keeps 8 of 16 rows: 4 · (32 + 16) + 51 train instead of 4 · 64 + 51; ρ = 0.25 keeps 4."""
    tiers = {"weak": {"share": 0.5, "mask_ratio": 0.25}, "strong": {"share": 0.5, "mask_ratio": 0.5}}
    found = costs(TINY, {"name": "fedhft", "timing": "pre"}, clients__tiers=tiers)
    assert {tier: (cost.trainable, cost.uplink) for tier, cost in found.items()} == {
        "weak": (4 * 40 + 51, 4 * 40 + 51),
        "strong": (4 * 48 + 51, 4 * 48 + 51),
    }


@pytest.mark.parametrize("method", ["local", "fedavg", "fedalt", "fedhft"])
def test_a_tier_trains_and_sends_its_own_rank(method: str) -> None:
    """q and v of two layers: 4 · 2 · 16 · r_k for the LoRA, 51 for the head; FedALT trains 4 · 32 for its mixers. What
    comes down is of the same rank, with π of two clusters for FedHFT."""
    tiers = {"weak": {"share": 0.5, "lora_rank": 1}, "strong": {"share": 0.5}}
    found = costs(TINY, method, clients__tiers=tiers)
    for tier, rank in (("weak", 1), ("strong", 2)):
        lora, mixers = 4 * 2 * 16 * rank, 4 * 2 * 16 if method == "fedalt" else 0
        sent = 0 if method == "local" else lora + 51
        assert (found[tier].trainable, found[tier].uplink) == (lora + mixers + 51, sent)
        assert found[tier].downlink == sent + (2 if method == "fedhft" else 0)


@pytest.mark.parametrize("method", ["fedreft", {"name": "fedavg", "adapter": "reft"}])
def test_a_tier_trains_and_sends_the_interventions_of_its_layers(method: Any) -> None:
    """Prefix and suffix of a layer: 2 · (2 · 2 · 16 + 2) = 132, and the head's 51."""
    tiers = {"weak": {"share": 0.5, "reft_layers": [1]}, "strong": {"share": 0.5}}
    found = costs(TINY, method, clients__tiers=tiers)
    assert {tier: (c.trainable, c.uplink, c.downlink) for tier, c in found.items()} == {
        "weak": (132 + 51,) * 3,
        "strong": (2 * 132 + 51,) * 3,
    }


def test_all_numbers_belong_to_one_client() -> None:
    """Two clients of unequal ρ: trainable parameters, uplink and mask are the second one's."""
    config = load_config(
        {
            "rounds": 1,
            "method": {"name": "fedhft", "timing": "pre"},
            "model": {
                "path": "random",
                "tokenizer": "bytes",
                "config": {k: TINY[k] for k in TINY if k != "num_labels"},
            },
            "data": {"source": "synthetic"},
            "lora": {"rank": 2},
        }
    )
    method = build_method(config, config.method[0])
    arch = architecture(config.model, "classification", CLASSES, None, None)
    for ratios, rows in (((1.0, 0.5), 8), ((0.5, 1.0), 16)):
        clients = [Client(f"client_{k}", k, 5, capacity={"mask_ratio": ratio}) for k, ratio in enumerate(ratios)]
        attached = Attached(method, method.attach(meta_backbone(arch, "classification")))
        found = method_cost(attached, attached, clients)
        expected = 4 * (2 * 16 + 2 * rows) + HEAD
        assert (found.trainable, found.uplink) == (expected, expected)


@pytest.mark.parametrize("number", [1, "two", True, 2.0])
def test_a_number_of_classes_that_is_none(number: Any) -> None:
    with pytest.raises(ConfigError, match="model.config.num_labels: expected a whole number of at least 2, got"):
        cost({**TINY, "num_labels": number}, "fedavg")


def test_the_splits_that_a_method_evaluates_itself() -> None:
    """IFCA chooses a model by its loss on the training examples."""
    assert cost(TINY, "ifca").evaluated == {"train"}
    assert cost(TINY, "fedavg").evaluated == set()
