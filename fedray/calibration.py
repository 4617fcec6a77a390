"""The cost of training on one example, measured once and then part of the configuration."""

from dataclasses import replace

from fedray.devices import examples_trained
from fedray.inline import InlinePool
from fedray.prepare import Prepared
from fedray.types import Client
from fedray.worker import Assignment, Worker

REPEATS = 3


def calibrated(prepared: Prepared) -> Prepared:
    """Return the experiment with `clients.example_seconds`: as configured, else, where who is aggregated depends on it,
    measured here: the client with the most examples trains for a round of the first method; the fastest of a few."""
    config = prepared.config
    if config.clients.example_seconds is not None or not config.clients.needs_example_seconds:
        return prepared
    client = max(prepared.clients, key=lambda client: (client.num_examples, client.id))
    seconds = min(_seconds_per_example(prepared, client))
    clients = config.clients.model_copy(update={"example_seconds": float(f"{seconds:.3g}")})
    return replace(prepared, config=config.model_copy(update={"clients": clients}))


def _seconds_per_example(prepared: Prepared, client: Client) -> list[float]:
    entry = prepared.config.method[0]
    job = prepared.jobs(entry)[client.tier]
    worker = Worker()
    worker.setup(job)
    federation = prepared.federation(entry, worker.initial(), InlinePool(prepared.data.shards))
    downlink = federation.method.configure_train(federation.server, prepared.clients)[client.id]
    examples = examples_trained(client.num_examples, federation.train[client.tier])
    measured = []
    for _ in range(REPEATS):
        outcome, _ = worker.train(Assignment(client, 0, measure=False), downlink, None, prepared.data.shards[client.id])
        measured.append(outcome.report.seconds / examples)
    return measured
