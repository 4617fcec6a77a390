"""What methods on products of LoRA factors train and send, against counts by hand: five clients in their second round.

RoBERTa-large with rank 8 on query and value: r · (d_in + d_out) = 8 · 2048 in 48 layers, 786,432, and a head of
1024 · 1024 + 1024 + 2 · 1024 + 2 = 1,051,650. Llama-2-7B, where there is no head: 8 · 8192 in 64 layers, 4,194,304.
"""

from typing import Any

import pytest

from fedray.config import load_config
from fedray.methods.registry import build_method
from fedray.models.architecture import architecture
from fedray.models.backbone import meta_backbone
from fedray.planning.accounting import Attached, Cost, method_cost
from fedray.types import Client

ROBERTA = {"model_type": "roberta", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
ROBERTA |= {"intermediate_size": 4096}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA |= {"intermediate_size": 11008, "vocab_size": 32000}
ROB, HEAD, SEVEN_B = 786_432, 1_051_650, 4_194_304


def cost(model: dict[str, Any], task: str, method: dict[str, Any]) -> Cost:
    config = load_config(
        {
            "rounds": 2,
            "method": method,
            "task": task,
            "model": {"path": "random", "tokenizer": "bytes", "config": model},
            "data": {"source": "synthetic"},
            "lora": {"rank": 8},
        }
    )
    built = build_method(config, config.method[0])
    labels = 2 if task == "classification" else None
    arch = architecture(config.model, config.task, labels, None, None)
    attached = Attached(built, built.attach(meta_backbone(arch, config.task)))
    return method_cost(attached, attached, [Client(f"client_{k}", k, 5) for k in range(5)])


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_what_is_carried_goes_down_as_five_adapters(name: str) -> None:
    """FLoRA: K r = 40 columns; FedEx-LoRA: the adapter, and (K − 1) r = 32 columns."""
    method = {"name": name, "carried_rank": 1000}
    found = cost(ROBERTA, "classification", method)
    assert (found.trainable, found.uplink, found.downlink) == (ROB + HEAD, ROB + HEAD, 5 * ROB + HEAD)
    assert (ROB + HEAD, 5 * ROB + HEAD) == (1_838_082, 4_983_810)
    found = cost(LLAMA, "causal_lm", method)
    assert (found.trainable, found.uplink, found.downlink) == (SEVEN_B, SEVEN_B, 20_971_520)


@pytest.mark.parametrize("name", ["flexlora", "lora_fair", "flora_na"])
def test_other_methods_on_products_send_what_fedavg_sends(name: str) -> None:
    found = cost(ROBERTA, "classification", {"name": name})
    assert (found.trainable, found.uplink, found.downlink) == (1_838_082,) * 3
