"""Settings that are measured once at the start of a run and are then part of its configuration: the cost of training on
one example, and how many clients are trained in one step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedray.experiment.prepare import Prepared
from fedray.federation.participation import cohort_size, examples_trained
from fedray.federation.result_batches import ResultBatch
from fedray.federation.rounds import Federation, Pool
from fedray.federation.tasks import ClientTask, downlinks_of
from fedray.training.batch_width import WIDTHS, fastest_width
from fedray.types import Client

REPEATS = 3
"""Times that a client's round is timed."""


def calibrated(prepared: Prepared, pool: Pool) -> Prepared:
    """Return the experiment with all measured settings filled in: `clients.fuse` if it is `auto`, and
    `clients.example_seconds` if participation depends on it and it is not configured. Both are timed with the first
    method, on the actors that will train the clients."""
    clients = prepared.config.clients
    if any(clients.tier(name).fuse == "auto" for name in clients.tier_names):
        prepared = _changed(prepared, _fused(prepared, pool))
    if clients.needs_example_seconds and clients.example_seconds is None:
        prepared = _changed(prepared, {"example_seconds": _example_seconds(prepared, pool)})
    return prepared


def _changed(prepared: Prepared, clients: dict[str, Any]) -> Prepared:
    section = prepared.config.clients.model_copy(update=clients)
    return replace(prepared, config=prepared.config.model_copy(update={"clients": section}))


def _fused(prepared: Prepared, pool: Pool) -> dict[str, Any]:
    """Return the fields of the section `clients` with `fuse` measured. A tier whose engine cannot train several clients
    in one step gets `off`."""
    clients = prepared.config.clients
    federation = _first_federation(prepared, pool)
    found: dict[str, Any] = {}
    for name in clients.tier_names:
        tier = clients.tier(name)
        mine = sorted((c for c in prepared.clients if c.tier == name), key=lambda c: (-c.num_examples, c.id))
        if tier.fuse == "auto":
            width = 1
            if tier.batches_clients and len(mine) > 1:
                width = _width(prepared, pool, federation, mine)
            found[name] = width if width > 1 else "off"
    if not clients.tiers:
        return {"fuse": found["default"]}
    tiers = {
        name: tier.model_copy(update={"fuse": found[name]}) if name in found else tier
        for name, tier in clients.tiers.items()
    }
    return {"tiers": tiers}


def _width(prepared: Prepared, pool: Pool, federation: Federation, mine: Sequence[Client]) -> int:
    """Return with how many of a tier's clients per step a round is fastest.

    Some of the largest clients train with every width. They are as many as an actor gets in a round, or an equal part
    of these, so that the cost of an incomplete last step is included.

    Args:
        mine: the tier's clients, the largest first.
    """
    total = len(prepared.clients)
    cohort = math.ceil(cohort_size(prepared.config.clients, total) * len(mine) / total)  # on average
    actors = pool.actors(mine[0].tier)
    share = math.ceil(cohort / actors)
    timed = math.ceil(share / math.ceil(share / max(WIDTHS)))
    return fastest_width(pool.width_seconds(_trial_tasks(federation, mine[:timed])), cohort, actors)


def _example_seconds(prepared: Prepared, pool: Pool) -> float:
    """Return the seconds that training on one example takes on the reference device.

    The largest client, of a tier on plain torch if there is one, trains for a round a few times. The fastest of these
    counts, multiplied by the speed of the client's tier.
    """
    config = prepared.config

    def rank(client: Client) -> tuple[bool, int, str]:
        return config.clients.tier(client.tier).engine.batches_clients, client.num_examples, client.id

    client = max(prepared.clients, key=rank)
    federation = _first_federation(prepared, pool)
    tasks = _trial_tasks(federation, [client])
    examples = examples_trained(client.num_examples, federation.train[client.tier])
    measured = []
    for _ in range(REPEATS):
        for found in pool.train(tasks):
            if isinstance(found, ResultBatch):
                measured.append(found.results[0].report.seconds / examples)
            elif found.exhausted:
                raise found.error()
    return float(f"{min(measured) * config.clients.tier(client.tier).speed:.3g}")


def _first_federation(prepared: Prepared, pool: Pool) -> Federation:
    entry = prepared.config.method[0]
    return prepared.federation(entry, pool.setup(prepared.worker_setups(entry)), pool)


def _trial_tasks(federation: Federation, clients: Sequence[Client]) -> list[ClientTask]:
    """Return tasks whose results are not kept."""
    downlinks = downlinks_of(federation.method.configure_train(federation.server, clients), clients)
    return [ClientTask(client, 0, downlinks[client.id], measure=False, keep="nothing") for client in clients]
