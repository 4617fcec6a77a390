"""Predicted memory against what torch's profiler sees allocated while clients train, evaluate and generate for real:
over tasks, vocabularies, lengths of answers, and sizes of batches.

The profiler counts allocated tensors; test_memory_of_processes.py compares with what processes take.
"""

from pathlib import Path
from typing import Any

import pytest
from allocations import most_allocated
from random_texts import write_clients
from tiny import TINY_LLAMA, tiny_bert

from fedray.config import load_config
from fedray.experiment.prepare import prepare
from fedray.federation.tasks import ClientTask, downlinks_of
from fedray.federation.worker import Worker


def measured(worker: Worker, tasks: list[ClientTask]) -> int:
    """The most that was allocated at one time while the tasks ran."""
    return most_allocated(lambda: [worker.train(task) for task in tasks])


KINDS = {"mixed": "full"}
"""Full fine-tuning in mixed precision."""
TEXTS = {"metric": "rouge_l", "max_new_tokens": 30}
RANKED = {"metric": "multiple_choice"}
SHORT, LONG, VARIED = (2, 2), (60, 60), (1, 60)


@pytest.mark.parametrize(
    ("task", "vocabulary", "answer", "prompt", "train", "evaluation", "adapter"),
    [
        ("causal_lm", 300, SHORT, (90, 90), 4, {"batch_size": 1}, "lora"),
        ("causal_lm", 300, LONG, (30, 90), 2, {"batch_size": 16}, "full"),
        ("causal_lm", 300, LONG, (30, 90), 2, {"batch_size": 16}, "mixed"),
        ("causal_lm", 300, SHORT, (40, 90), 1, {"batch_size": 6} | TEXTS, "lora"),
        ("causal_lm", 300, SHORT, (40, 90), 1, {"batch_size": 6} | TEXTS, "branches"),
        ("causal_lm", 32_000, SHORT, (90, 90), 4, {"batch_size": 64}, "lora"),
        ("causal_lm", 32_000, LONG, (30, 30), 1, {"batch_size": 2}, "lora"),
        ("causal_lm", 32_000, SHORT, (30, 90), 2, {"batch_size": 4} | RANKED, "lora"),
        ("causal_lm", 32_000, SHORT, (90, 90), 1, {"batch_size": 4}, "reft"),
        ("causal_lm", 32_000, VARIED, (30, 90), 4, {"batch_size": 1}, "lora"),
        ("causal_lm", 128_000, SHORT, (90, 90), 2, {"batch_size": 4}, "lora"),
        ("causal_lm", 128_000, LONG, (30, 90), 2, {"batch_size": 2}, "lora"),
        ("classification", 300, SHORT, (90, 90), 64, {"batch_size": 1}, "lora"),
        ("classification", 300, SHORT, (30, 120), 1, {"batch_size": 64}, "lora"),
        ("classification", 32_000, SHORT, (30, 30), 1, {"batch_size": 4}, "full"),
        ("regression", 300, SHORT, (30, 120), 4, {"batch_size": 4}, "lora"),
    ],
)
def test_what_is_predicted_is_allocated_within_a_tenth(
    task: str,
    vocabulary: int,
    answer: tuple[int, int],
    prompt: tuple[int, int],
    train: int,
    evaluation: dict[str, Any],
    adapter: str,
    tmp_path: Path,
) -> None:
    """Both rounds of both clients, whose batches decide. Weights and adapter exist before; what is small in all is the
    payloads."""
    write_clients(tmp_path, task, prompt, answer, 50 if "multiple_choice" in evaluation.values() else 0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": vocabulary, "max_position_embeddings": 200}
    model = tiny_bert(**sizes)
    if task == "causal_lm":
        model["config"] = TINY_LLAMA | sizes
    model["dtype"] = "bfloat16" if adapter == "mixed" else "float32"
    section = {"source": "files", "files": {"train": str(tmp_path / "*.jsonl")}, "max_length": 160}
    if evaluation.get("metric") == "multiple_choice":
        section["choices"] = "options"
    config = load_config(
        {
            "rounds": 1,
            "task": task,
            "method": "fedalt" if adapter == "branches" else {"name": "fedavg", "adapter": KINDS.get(adapter, adapter)},
            "model": model,
            "data": section | {"cache_dir": str(tmp_path / "cache")},
            "partition": {"kind": "by_file"},
            "train": {"batch_size": train},
            "evaluation": evaluation,
            "device": "cpu",
            "runtime": "inline",
        }
    )
    prepared, (entry,) = prepare(config), config.method
    worker = Worker()
    worker.setup(prepared.worker_setups(entry)["default"])
    federation = prepared.federation(entry, worker.initial(), None)  # type: ignore[arg-type]
    downlinks = downlinks_of(federation.method.configure_train(federation.server, prepared.clients), prepared.clients)
    tasks = [
        ClientTask(client, server_round, downlinks[client.id], True, shard=prepared.data.shards[client.id])
        for server_round in range(2)
        for client in prepared.clients
    ]
    predicted = prepared.footprint(entry, "default").device
    moving = predicted.gradients + predicted.optimizer + predicted.activations
    assert moving == pytest.approx(measured(worker, tasks), rel=0.1)
