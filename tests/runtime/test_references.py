"""What a run leaves behind from round to round: no reference, no object, no file that nobody needs."""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from ray._private.worker import global_worker
from round_result import result_of
from tiny import tiny_experiment

from fedray.config import load_config
from fedray.experiment.prepare import Prepared, prepare
from fedray.federation.local_pool import LocalPool
from fedray.runtime.pool import ClientPool
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import sha256

ROUNDS = 5


def references() -> set[bytes]:
    """What this process owns or holds in Ray's object store."""
    return set(global_worker.core_worker.get_all_reference_counts())


def lasting(known: set[bytes]) -> set[bytes]:
    """References that were not known and that Ray does not let go of: it looks every ten seconds for the ends of
    streams that were not read to their end. What an earlier test left behind may vanish at any time."""
    deadline = monotonic() + 60
    while (new := references() - known) and monotonic() < deadline:
        sleep(0.1)
    return new


METHODS = ["fedavg", "fedalt"]
"""Of fedavg, actors return means; of fedalt every update, and each client keeps a state."""


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    clients = {"count": 9, "per_round": 7, "actors": 2, "num_cpus": 0.5}
    changes = {"method": METHODS, "rounds": ROUNDS, "clients": clients, "evaluation": {"every": 0}}
    return prepare(load_config({**tiny_experiment(), **changes}))


@pytest.fixture(scope="module")
def pools(prepared: Prepared, cluster: None) -> Iterator[dict[str, ClientPool | LocalPool]]:
    """One of each kind, made ready for one method after the other."""
    shards = prepared.data.shards
    on_ray = ClientPool(prepared.config.clients, shards, {"default": 7})
    yield {"ray": on_ray, "inline": LocalPool(shards)}
    on_ray.close()


@pytest.mark.parametrize("method", METHODS)
def test_rounds_leave_nothing_behind_and_bits_do_not_depend_on_chunks(
    prepared: Prepared, pools: dict[str, ClientPool | LocalPool], tmp_path: Path, method: str
) -> None:
    entry = prepared.config.method[METHODS.index(method)]
    hashes = {}
    for name, pool in pools.items():
        states = tmp_path / name / "states" / method
        states.mkdir(parents=True)
        initial = pool.setup(prepared.worker_setups(entry, StoragePath.of(tmp_path / name)))
        federation = prepared.federation(entry, initial, pool)
        known = references()
        for _ in range(ROUNDS):
            pool.forget(result_of(federation.round()).replaced)  # as the experiment does once the round is recorded
            kept = {ref.file for ref in federation.client_states.values()} - {""}
            assert kept == {path.name for path in states.iterdir()}
            assert bool(kept) == (method == "fedalt")
        assert not lasting(known)
        hashes[name] = sha256(federation.states())
    assert federation.server_round == ROUNDS
    assert hashes["ray"] == hashes["inline"]
