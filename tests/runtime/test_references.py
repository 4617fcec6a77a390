"""What a run leaves behind from round to round: no reference, no object, no file that nobody needs."""

from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from ray._private.worker import global_worker
from round_result import result_of

from fedray.config import load_config
from fedray.experiment.prepare import prepare
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


@pytest.mark.parametrize("method", ["fedavg", "fedalt"])
def test_rounds_leave_nothing_behind_and_bits_do_not_depend_on_task_batches(
    tiny: dict[str, Any], cluster: None, tmp_path: Path, method: str
) -> None:
    """Of fedavg, actors return means; of fedalt every update, and each client keeps a state."""
    clients = {"count": 9, "per_round": 7, "actors": 2, "num_cpus": 0.5}
    config = load_config({**tiny, "method": method, "rounds": ROUNDS, "clients": clients, "evaluation": {"every": 0}})
    prepared = prepare(config)
    shards = prepared.data.shards
    pools = {"ray": ClientPool(config.clients, shards, {"default": 7}), "inline": LocalPool(shards)}
    hashes = {}
    for name, pool in pools.items():
        states = tmp_path / name / "states" / method
        states.mkdir(parents=True)
        initial = pool.setup(prepared.worker_setups(config.method[0], StoragePath.of(tmp_path / name)))
        federation = prepared.federation(config.method[0], initial, pool)
        known = references()
        for _ in range(ROUNDS):
            pool.forget(result_of(federation.round()).replaced)  # as the experiment does once the round is recorded
            kept = {ref.file for ref in federation.client_states.values()} - {""}
            assert kept == {path.name for path in states.iterdir()}
            assert bool(kept) == (method == "fedalt")
        assert not lasting(known)
        hashes[name] = sha256(federation.states())
    pools["ray"].close()  # type: ignore[attr-defined]
    assert federation.server_round == ROUNDS
    assert hashes["ray"] == hashes["inline"]
