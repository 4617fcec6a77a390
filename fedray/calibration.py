"""The cost of training on one example, measured once and then part of the configuration."""

from dataclasses import replace

from fedray.devices import examples_trained
from fedray.federation import Pool
from fedray.prepare import Prepared
from fedray.types import Client
from fedray.worker import Assignment

REPEATS = 3


def calibrated(prepared: Prepared, pool: Pool) -> Prepared:
    """Return the experiment with `clients.example_seconds`: as configured, else, where who is aggregated depends on it,
    measured where clients train: the largest client, of a tier on plain torch if there is one, trains for a round of
    the first method; the fastest of a few, times its tier's speed."""
    config = prepared.config
    if config.clients.example_seconds is not None or not config.clients.needs_example_seconds:
        return prepared

    def rank(client: Client) -> tuple[bool, int, str]:
        return config.clients.tier(client.tier).engine == "torch", client.num_examples, client.id

    client = max(prepared.clients, key=rank)
    seconds = _seconds_per_example(prepared, pool, client) * config.clients.tier(client.tier).speed
    clients = config.clients.model_copy(update={"example_seconds": float(f"{seconds:.3g}")})
    return replace(prepared, config=config.model_copy(update={"clients": clients}))


def _seconds_per_example(prepared: Prepared, pool: Pool, client: Client) -> float:
    entry = prepared.config.method[0]
    federation = prepared.federation(entry, pool.setup(prepared.jobs(entry)), pool)
    downlinks = federation.method.configure_train(federation.server, [client])
    examples = examples_trained(client.num_examples, federation.train[client.tier])
    measured = []
    for _ in range(REPEATS):
        ((outcome, _),) = pool.train([Assignment(client, 0, measure=False)], downlinks, {})
        measured.append(outcome.report.seconds / examples)
    return min(measured)
