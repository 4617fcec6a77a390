"""The work of every row, and the files that all contenders read: the same tokens, images and base weights.

This module imports numpy only, and torch where it is needed, because the peers' environments have no fedray.
"""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np

BOS, EOS, LETTER_A = 257, 258, 97
"""Token ids of fedray's tokenizer `bytes`; contenders that do not tokenise read the same ids from a file."""

DECODER = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Workload:
    """One row.

    Attributes:
        kind: `null` adds 1 to the payload; `cnn` and `lora` train it.
        payload: float32 numbers of the payload (kind null).
        state: float32 numbers of each client's private state, to which every task adds 1.
        each: whether fedray's server receives every update instead of only their mean (kind null).
        examples: examples of each client.
        steps: optimizer steps of a task, with `batch` examples each.
    """

    row: str
    kind: Literal["null", "cnn", "lora"]
    clients: int
    per_round: int
    rounds: int
    payload: int = 0
    state: int = 0
    each: bool = False
    dies: str = ""
    examples: int = 1
    tokens: int = 64
    batch: int = 1
    steps: int = 0
    lr: float = 0.1
    decoder: str = json.dumps(DECODER)
    files: str = ".bench/files"

    def path(self, name: str) -> Path:
        return Path(self.files).resolve() / name

    @property
    def base(self) -> Path:
        """Folder of the decoder's random base weights."""
        return self.path(f"decoder-{json.loads(self.decoder)['hidden_size']}")

    @property
    def data(self) -> Path:
        """File of tokens (int64) or images (uint8), [clients, examples, ...]."""
        shape = f"{self.clients}-{self.examples}" + (f"-{self.tokens}" if self.kind == "lora" else "")
        return self.path(f"{self.kind}-{shape}.npy")

    def kill_once(self, server_round: int) -> None:
        """Kill this process like a crash, once, in the second round of a row that requests it."""
        if self.dies and server_round == 1:
            try:
                Path(self.dies, "died").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def shortened(self, rounds: int) -> "Workload":
        return replace(self, rounds=min(self.rounds, rounds))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def rows(quick: bool, files: Path) -> dict[str, Workload]:
    """Return all rows in which clients train.

    Args:
        quick: shrink all rows so that they take minutes.
    """
    lora = Workload("W3", "lora", 200, 20, 20, examples=64, tokens=64, batch=8, steps=8, lr=1e-3)
    mb = 1_000_000 // 4
    every = [
        Workload("W0, 50 per round", "null", 1000, 50, 10, payload=1024),
        Workload("W0, 1000 per round", "null", 1000, 1000, 10, payload=1024),
        *(Workload(f"W1, {size} MB", "null", 100, 20, 10, payload=size * mb) for size in (1, 10, 50)),
        Workload("W2", "cnn", 1000, 50, 20, examples=50, batch=10, steps=5),
        lora,
        *(replace(lora, row=f"W3s, batch {size}", batch=size, tokens=32) for size in (1, 2)),
        replace(lora, row="W4", state=mb),
        Workload("S1", "null", 10_000, 100, 50, payload=1024, state=76_800),
    ]
    small = {**DECODER, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {
        workload.row: replace(workload if not quick else _quick(workload, json.dumps(small)), files=str(files))
        for workload in every
    }


def reliability_rows(quick: bool, files: Path) -> dict[str, Workload]:
    """Return the rows that count lost updates (W5) and compare results (W6)."""
    found = {
        "W5": Workload("W5", "null", 100, 20, 5, payload=1024),
        "W6": Workload("W6", "cnn", 1000, 20, 3, examples=50, batch=10, steps=5),
    }
    return {row: replace(_quick(one, one.decoder) if quick else one, files=str(files)) for row, one in found.items()}


def _quick(workload: Workload, decoder: str) -> Workload:
    return replace(
        workload,
        clients=min(workload.clients, 24),
        per_round=min(workload.per_round, 4),
        rounds=3,
        payload=min(workload.payload, 4096),
        state=min(workload.state, 4096),
        examples=min(workload.examples, 16),
        batch=min(workload.batch, 2),
        steps=min(workload.steps, 2),
        decoder=decoder,
    )


def make_files(workload: Workload) -> None:
    """Write the files of a row that do not exist yet."""
    if workload.kind == "null" or workload.data.exists():
        return
    workload.data.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    if workload.kind == "cnn":
        np.save(workload.data, rng.integers(0, 256, (workload.clients, workload.examples, 3, 32, 32), np.uint8))
        return
    if not workload.base.exists():
        _make_base(workload)
    letters = rng.integers(LETTER_A, LETTER_A + 26, (workload.clients, workload.examples, workload.tokens - 2))
    np.save(workload.data, np.pad(np.pad(letters, [(0, 0), (0, 0), (1, 0)], constant_values=BOS),
                                  [(0, 0), (0, 0), (0, 1)], constant_values=EOS))  # fmt: skip


def _make_base(workload: Workload) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(workload.decoder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.save_pretrained(workload.base)


def cohort(workload: Workload, server_round: int) -> Sequence[int]:
    """Return the clients of a round, for contenders without a sampler of their own."""
    rng = np.random.default_rng([7, server_round])
    return [int(client) for client in rng.choice(workload.clients, workload.per_round, replace=False)]


class Timeline:
    """Records when a contender's first round began and every round ended, on the clock that all processes share."""

    def __init__(self, path: str):
        self._path = Path(path)
        self._begun: float | None = None
        self._ends: list[float] = []

    def begin(self, at: float | None = None) -> None:
        """Record the start of the first round; later calls change nothing.

        Args:
            at: a time of `monotonic()`; default now.
        """
        if self._begun is None:
            self._begun = monotonic() if at is None else at

    def end_round(self) -> None:
        self._ends.append(monotonic())

    def write(self, **facts: Any) -> None:
        """Write the result.

        Args:
            facts: values that show that the work was done; see `table.check`.
        """
        self._path.write_text(json.dumps({"begun": self._begun, "ends": self._ends, **facts}), encoding="utf-8")
