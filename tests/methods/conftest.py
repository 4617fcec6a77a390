"""What the tests of methods share: whole rounds of a tiny model in this process, and the six functions on their own.

`train` runs real rounds. `VectorAdapter` is an adapter that only holds vectors and `FakeLocal` a client's side of a
round whose training is a function of the test: with these a method's own arithmetic shows without a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from fedhft_parts import RANK, WIDTH
from round_result import result_of
from tiny import tiny_bert

from fedray.adapters.layout import Layout, Slot
from fedray.config import Config, load_config
from fedray.data.shards import Shard
from fedray.experiment.population import make_clients
from fedray.experiment.prepare import Prepared, prepare
from fedray.federation.local_pool import LocalPool
from fedray.federation.rounds import Federation, RoundResult
from fedray.federation.tasks import ClientResult, ClientTask, downlinks_of
from fedray.federation.worker import Worker
from fedray.methods.protocol import Initial, Update
from fedray.storage.paths import StoragePath
from fedray.types import Client, Evaluation, Split

SIZES = {"client_000": 9, "client_001": 5, "client_002": 7}
"""Training examples of the first clients (all others have all of theirs): unequal, so that weights matter."""


@dataclass
class Run:
    """A federation whose rounds the test runs one by one."""

    prepared: Prepared
    initial: Initial
    pool: LocalPool
    federation: Federation

    @property
    def config(self) -> Config:
        return self.prepared.config

    @property
    def worker(self) -> Worker:
        """The one that serves all clients, where there is one tier."""
        (worker,) = self.pool.workers.values()
        return worker

    @property
    def adapter(self) -> Any:
        """The one of the first tier's worker."""
        return next(iter(self.pool.workers.values())).adapter

    @property
    def server(self) -> Any:
        return self.federation.server

    @property
    def method(self) -> Any:
        return self.federation.method

    def round(self) -> RoundResult:
        """Run one round."""
        return result_of(self.federation.round())

    def rounds(self, number: int) -> list[RoundResult]:
        return [self.round() for _ in range(number)]

    def serve(self, *ids: str) -> dict[str, ClientResult]:
        """Run the tasks of these clients, or of all, in this order, without changing the federation."""
        results = {}
        for task in self.tasks(ids or sorted(self.pool.shards)):
            results[task.client.id] = self.pool.workers[task.client.tier].train(task)
        return results

    def tasks(self, ids: Sequence[str], measure: bool = False) -> list[ClientTask]:
        """Return what a worker receives for these clients, in their order."""
        clients = {client.id: client for client in self.prepared.clients}
        downlinks = downlinks_of(self.method.configure_train(self.server, self.prepared.clients), self.prepared.clients)
        states = self.states()
        return [
            ClientTask(
                clients[id],
                self.federation.server_round,
                downlinks[id],
                measure,
                keep="adapter",
                state=states.get(id),
                shard=self.pool.shards[id],
            )
            for id in ids
        ]

    def states(self) -> dict[str, Any]:
        """The states of those who have trained."""
        refs = self.federation.client_states
        return dict(zip(refs, self.pool.fetch(list(refs.values())), strict=True))

    def state(self, id: str) -> Any:
        return self.states()[id]

    def views(self, group: str, vector: Any) -> dict[str, Any]:
        return self.initial.layouts[group].views(vector)


def unequal(prepared: Prepared) -> Prepared:
    """Cut the first clients' training examples to SIZES."""
    shards = {
        id: Shard(id, {**shard.tables, "train": shard.tables["train"].slice(0, SIZES.get(id))})
        for id, shard in prepared.data.shards.items()
    }
    clients = make_clients(prepared.config.clients, shards, prepared.config.seed)
    return replace(prepared, data=replace(prepared.data, shards=shards), clients=clients)


@pytest.fixture(scope="session")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Prepared], Run]:
    """begin(prepared): the federation of its first method, before its first round."""

    def begun(prepared: Prepared) -> Run:
        entry, pool = prepared.config.method[0], LocalPool(prepared.data.shards)
        folder = tmp_path_factory.mktemp("run")
        (folder / "states" / entry.key).mkdir(parents=True)
        initial = pool.setup(prepared.worker_setups(entry, StoragePath.of(folder)))
        return Run(prepared, initial, pool, prepared.federation(entry, initial, pool))

    return begun


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Prepared], Run]) -> Callable[..., Run]:
    """start(method, **changes): a federation of three clients with 9, 5 and 7 examples, before its first round.

    method: the entry of `config.method`. changes: overrides, with `__` for the dot in a path.
    """
    base = {
        "rounds": 4,
        "seed": 3,
        "method": "local",
        "model": tiny_bert(
            num_hidden_layers=2, intermediate_size=24, max_position_embeddings=128, initializer_range=0.2
        ),
        "data": {
            "source": "synthetic",
            "classes": 3,
            "examples_per_client": 16,
            "max_length": 24,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "partition": {"kind": "by_file"},
        "clients": {"count": 3},
        "lora": {"rank": 2, "alpha": 8.0, "dropout": 0.1},
        "reft": {"rank": 2},
        "train": {"epochs": 1, "batch_size": 4, "lr": 0.01, "weight_decay": 0.05, "clip": 1.0, "schedule": "linear"},
        "evaluation": {"every": 0},
        "device": "cpu",
        "runtime": "inline",
    }

    def build(method: Mapping[str, Any] | str, **changes: Any) -> Run:
        overrides = {path.replace("__", "."): value for path, value in changes.items()}
        config = load_config(base, {**overrides, "method": method})
        return begin(unequal(prepare(config)))

    return build


class VectorAdapter:
    """An adapter that only holds vectors."""

    def __init__(self, initial: Initial):
        self._layouts = dict(initial.layouts)
        self._vectors = {name: vector.copy() for name, vector in initial.vectors.items()}
        self.names = tuple(self._layouts)

    def layout(self, name: str) -> Layout:
        group, _, part = name.partition(".")
        return self._layouts[group].part(part) if part else self._layouts[group]

    def read(self, name: str) -> Any:
        group, where = self._where(name)
        return self._vectors[group][where].copy()

    def load(self, name: str, vector: Any) -> None:
        assert vector.shape == (self.layout(name).size,)
        group, where = self._where(name)
        self._vectors[group][where] = vector

    def _where(self, name: str) -> tuple[str, Any]:
        group, _, part = name.partition(".")
        return group, self._layouts[group].mask({part}) if part else slice(None)


@dataclass
class FakeLocal:
    """A client's side of one round: `train` calls `training` with the adapter and returns `gradient` if the mean
    gradient is asked for, `evaluate` asks `loss` about the adapter.

    Attributes:
        calls: the arguments of every training that were given, without `parts: None`.
        measured: how often `measure` was called.
    """

    client: Client
    adapter: VectorAdapter
    training: Callable[[VectorAdapter], None] = lambda adapter: None
    loss: Callable[[VectorAdapter], float] = lambda adapter: 0.0
    gradient: Mapping[str, Any] = field(default_factory=dict)
    measures: bool = True
    num_validation: int = 1
    server_round: int = 0
    seed: int = 0
    evaluated: list[Split] = field(default_factory=list)
    recorded: dict[str, Any] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    measured: int = 0

    def train(self, parts: Sequence[str] | None = None, **options: Any) -> Mapping[str, Any]:
        self.calls.append(options if parts is None else {"parts": tuple(parts), **options})
        self.training(self.adapter)
        return self.gradient if options.get("mean_gradient") else {}

    def measure(self) -> None:
        self.measured += 1

    def evaluate(self, split: Split) -> Evaluation:
        self.evaluated.append(split)
        return Evaluation(self.loss(self.adapter), {"accuracy": 0.0}, self.num_validation)

    def record(self, name: str, value: Any) -> None:
        self.recorded[name] = value


@pytest.fixture
def vector_adapter() -> type[VectorAdapter]:
    return VectorAdapter


@pytest.fixture
def fake_local() -> type[FakeLocal]:
    return FakeLocal


@pytest.fixture
def clients() -> Sequence[Client]:
    """Clients a to e with 1 to 5 examples."""
    return [Client(id, index, index + 1) for index, id in enumerate("abcde")]


@pytest.fixture
def paper() -> Initial:
    """Layouts of two layers: LoRA and Rest-of-World of rank 2 on 4 → 3, mixers, LoReFT of rank 2 on 5, a head of 3.

    Frozen second branches are zero, everything else is drawn; R is not orthonormal, since a VectorAdapter does not
    mind.
    """
    paths = ("layer.0.value", "layer.1.value")
    lora = Layout(tuple(slot for path in paths for slot in (Slot(path, "A", (2, 4)), Slot(path, "B", (3, 2)))))
    layouts = {
        "lora": lora,
        "rest": lora,
        "mixer": Layout(tuple(Slot(path, "G", (2, 4)) for path in paths)),
        "reft": Layout(
            tuple(
                slot
                for path in ("layer.0", "layer.1")
                for where in ("prefix", "suffix")
                for slot in (
                    Slot(f"{path}.{where}", "R", (2, 5)),
                    Slot(f"{path}.{where}", "W", (2, 5)),
                    Slot(f"{path}.{where}", "b", (2,)),
                )
            )
        ),
        "head": Layout((Slot("classifier.weight", "tensor", (3,)),)),
    }
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=layout.size).astype(np.float32) for name, layout in layouts.items()}
    vectors["rest"][:] = 0
    return Initial(7, layouts, vectors)


@pytest.fixture
def spread() -> Callable[[int, int], Any]:
    """spread(n, d): n points, [n, d], without symmetry."""
    return lambda n, d: np.random.default_rng(n * 1000 + d).normal(size=(n, d)).astype(np.float32)


@pytest.fixture
def updates() -> Callable[..., Iterator[Any]]:
    """updates(clients, payloads): what the server gets, in the order of client ids."""
    return lambda clients, payloads: [
        Update(client, client.num_examples, payload) for client, payload in zip(clients, payloads, strict=True)
    ]


@pytest.fixture(scope="module")
def fedhft(tmp_path_factory: pytest.TempPathFactory, begin: Callable[[Any], Run]) -> Callable[..., Run]:
    """fedhft(hyperparameters, **changes): four clients of a tiny BERT before their first round, their memberships kept
    unless the test says otherwise. `__` stands for the dot in a path."""
    base = {
        "rounds": 4,
        "seed": 3,
        "method": "fedhft",
        "model": {
            "path": "random",
            "tokenizer": "bytes",
            "config": {
                "model_type": "bert",
                "hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "max_position_embeddings": 128,
                "initializer_range": 0.2,
            },
        },
        "data": {
            "source": "synthetic",
            "classes": 3,
            "examples_per_client": 16,
            "max_length": 24,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
        "partition": {"kind": "by_file"},
        "clients": {"count": 4},
        "lora": {"rank": RANK, "alpha": 4.0, "dropout": 0.1},
        # SGD: Adam would magnify the last digits in which two equal downlinks differ.
        "train": {"batch_size": 4, "max_steps": 3, "optimizer": "sgd", "lr": 10.0, "head_lr": 0.5},
        "evaluation": {"every": 0},
        "device": "cpu",
        "runtime": "inline",
    }

    def build(hyperparameters: Mapping[str, Any], **changes: Any) -> Run:
        entry = {"name": "fedhft", "warmup_rounds": 100, **hyperparameters}
        config = load_config(base, {path.replace("__", "."): value for path, value in changes.items()})
        config = load_config(config, {"method": entry})
        return begin(prepare(config))

    return build
