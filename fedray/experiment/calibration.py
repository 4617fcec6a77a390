"""Settings that are found once at the start of a run and are then part of its configuration: how many clients are
trained in one step, and the cost of training on one example."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedray.errors import ConfigError
from fedray.experiment.prepare import Prepared
from fedray.federation.participation import cohort_size, examples_trained
from fedray.federation.result_batches import ResultBatch
from fedray.federation.rounds import Federation, Pool
from fedray.federation.tasks import ClientTask, downlinks_of
from fedray.training.batch_width import WIDTHS, fastest_width, largest_width
from fedray.types import Client

REPEATS = 3
"""Times that a client's round is timed."""
USED_MEMORY = 0.8
"""Share of an actor's part of a GPU that predictions may fill; the rest is for what they do not see, such as the memory
that the allocator cannot merge, and workspaces of kernels."""

log = logging.getLogger(__name__)


def calibrated(prepared: Prepared, pool: Pool) -> Prepared:
    """Return the experiment with all settings filled in that depend on the actors: `clients.fuse`, unless it is a
    number or `off`, and `clients.example_seconds` if participation depends on it and it is not configured. Seconds are
    measured with the first method, on the actors that will train the clients."""
    prepared = _fused(prepared, pool)
    clients = prepared.config.clients
    if clients.needs_example_seconds and clients.example_seconds is None:
        prepared = _changed(prepared, {"example_seconds": _example_seconds(prepared, pool)})
    return prepared


def _changed(prepared: Prepared, clients: dict[str, Any]) -> Prepared:
    section = prepared.config.clients.model_copy(update=clients)
    return replace(prepared, config=prepared.config.model_copy(update={"clients": section}))


def _fused(prepared: Prepared, pool: Pool) -> Prepared:
    """Return the experiment with the width of each tier that has `auto`: the fastest on a CPU, the largest that fits on
    a GPU, `off` if its engine cannot train several clients in one step. A tier without `fuse` has `auto` on a GPU, and
    stays as it is on a CPU, where it trains one by one."""
    config, found, timed = prepared.config, {}, []
    for name in config.clients.tier_names:
        tier, mine = config.clients.tier(name), _largest_first(prepared, name)
        if tier.fuse not in (None, "auto"):
            continue
        able = tier.batches_clients and len(mine) > 1
        room = _gpu_room(prepared, pool, name) if able else None
        if room is not None:
            found[name] = _fitting_width(prepared, pool, name, room)
        elif tier.fuse == "auto":
            found[name] = 1
            timed += [name] if able else []
    if timed:
        federation = _first_federation(prepared, pool)
        found |= {name: _width(prepared, pool, federation, _largest_first(prepared, name)) for name in timed}
    return _with_widths(prepared, found) if found else prepared


def _largest_first(prepared: Prepared, tier: str) -> list[Client]:
    return sorted((c for c in prepared.clients if c.tier == tier), key=lambda c: (-c.num_examples, c.id))


def _with_widths(prepared: Prepared, widths: Mapping[str, int]) -> Prepared:
    """Return the experiment with `fuse` by tier; 1 is `off`."""
    clients = prepared.config.clients
    fuse = {name: width if width > 1 else "off" for name, width in widths.items()}
    if not clients.tiers:
        return _changed(prepared, {"fuse": fuse["default"]})
    tiers = {
        name: tier.model_copy(update={"fuse": fuse[name]}) if name in fuse else tier
        for name, tier in clients.tiers.items()
    }
    return _changed(prepared, {"tiers": tiers})


def _gpu_room(prepared: Prepared, pool: Pool, tier: str) -> int | None:
    """Return the bytes of a GPU that an actor of the tier may use; None if the tier trains on a CPU."""
    config = prepared.config
    if config.device == "cpu" or config.clients.tier(tier).num_gpus == 0:
        return None
    room = pool.gpu_memory(tier)
    if room is not None and config.runtime == "inline":  # the workers of all tiers are in this process
        room //= len(prepared.cohorts())
    return None if room is None else int(room * USED_MEMORY)


def _fitting_width(prepared: Prepared, pool: Pool, tier: str, room: int) -> int:
    """Return how many of a tier's clients per step fit on its actors' GPU by prediction, with every method; 1 if the
    memory cannot be predicted."""

    def held(width: int) -> int:
        wide = _with_widths(prepared, {tier: width})
        return max(wide.footprint(entry, tier).device.total for entry in prepared.config.method)

    try:
        return largest_width(held, room, _share(prepared, pool, tier))
    except ConfigError as error:
        log.warning("tier %r: clients are trained one by one unless clients.fuse is a number: %s", tier, error)
        return 1


def _share(prepared: Prepared, pool: Pool, tier: str) -> int:
    """Return how many of a tier's clients an actor gets in a round, on average."""
    return math.ceil(_cohort(prepared, tier) / pool.actors(tier))


def _cohort(prepared: Prepared, tier: str) -> int:
    """Return how many of a tier's clients a round has, on average."""
    total, mine = len(prepared.clients), sum(client.tier == tier for client in prepared.clients)
    return math.ceil(cohort_size(prepared.config.clients, total) * mine / total)


def _width(prepared: Prepared, pool: Pool, federation: Federation, mine: Sequence[Client]) -> int:
    """Return with how many of a tier's clients per step a round is fastest.

    Some of the largest clients train with every width. They are as many as an actor gets in a round, or an equal part
    of these, so that the cost of an incomplete last step is included.

    Args:
        mine: the tier's clients, the largest first.
    """
    tier = mine[0].tier
    share = _share(prepared, pool, tier)
    timed = math.ceil(share / math.ceil(share / max(WIDTHS)))
    seconds = pool.width_seconds(_trial_tasks(federation, mine[:timed]))
    return fastest_width(seconds, _cohort(prepared, tier), pool.actors(tier))


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
            elif found is not None and found.exhausted:
                raise found.error()
    return float(f"{min(measured) * config.clients.tier(client.tier).speed:.3g}")


def _first_federation(prepared: Prepared, pool: Pool) -> Federation:
    entry = prepared.config.method[0]
    return prepared.federation(entry, pool.setup(prepared.worker_setups(entry)), pool)


def _trial_tasks(federation: Federation, clients: Sequence[Client]) -> list[ClientTask]:
    """Return tasks whose results are not kept."""
    downlinks = downlinks_of(federation.method.configure_train(federation.server, clients), clients)
    return [ClientTask(client, 0, downlinks[client.id], measure=False, keep="nothing") for client in clients]
