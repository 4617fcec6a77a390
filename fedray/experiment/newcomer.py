"""A client that arrives after the run: it starts from what the server holds, trains on its own examples, and is
evaluated, as every client is in the final pass.

The server treats it as a client of the federation that was absent until now (`admitted`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.config import Config, TierConfig
from fedray.data.load import load_newcomer
from fedray.errors import ConfigError, choices, nearest
from fedray.evaluation.metrics import for_classes
from fedray.experiment.population import make_client
from fedray.experiment.restore import FinishedRun, Restored
from fedray.federation.tasks import ClientTask, WorkerSetup, downlinks_of
from fedray.federation.worker import Worker
from fedray.methods.protocol import AnyMethod, admitted
from fedray.methods.registry import build_method
from fedray.models.tokenizer import named_tokens
from fedray.storage.checkpoints import Checkpoints
from fedray.storage.paths import StoragePath
from fedray.training.trainer import ClientReport
from fedray.types import Client, ClientId, Role

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Newcomer:
    """A client that has arrived after the run.

    Attributes:
        client: as the method saw it.
        restored: its model, after its local training.
        report: what was trained and measured: `aggregated` with what the server holds, `personalised` after the local
            training.
    """

    client: Client
    restored: Restored
    report: ClientReport


def train_newcomer(
    run_folder: str | Path | StoragePath,
    method: str | None,
    data: str | Path,
    *,
    test: str | Path | None = None,
    client: ClientId | None = None,
    tier: str | None = None,
    device: str | None = None,
) -> Newcomer:
    """Train a client that the run did not have, in this process. Nothing in the run's folder changes.

    Args:
        method: its name or label in the run; None if there is one only.
        data: a file of the client's examples, with the columns of the run's data.
        test: a file with its test examples; None: the run's share of `data` is held out.
        client: its name; None: that of the file.
        tier: of the run's tiers; None: the first.
        device: cuda or cpu; default what the configuration says, with this machine's devices.

    Raises:
        ConfigError: the run has no such method or tier, has a client of that name, or the data do not fit it.
        StateError: the run has not finished, or has no checkpoint.
        TrainingError: the client cannot train.
    """
    run = FinishedRun(run_folder)
    entry = run.entry(method)
    config = _in_this_process(run.config, device)
    known = run.clients(entry)
    name = Path(data).name.partition(".")[0] if client is None else client
    if name in known:
        raise ConfigError(f"client: {name!r} is already a client of {run.place}; give the new one another name")
    tiers = config.clients.tier_names
    if tier is not None and tier not in tiers:
        raise ConfigError(f"tier: {run.place} has no tier {tier!r}{nearest(tier, tiers)}; it has {choices(tiers)}")
    files: dict[Role, str] = {"train": str(data), **({} if test is None else {"test": str(test)})}
    tokenizer, label_names = run.tokenizer, run.label_names
    own = load_newcomer(config, tokenizer, name, files, label_names)
    for note in own.notes:
        log.warning("%s", note)
    shard = own.shards[name]
    arrived = make_client(config.clients, name, len(known), shard.num_examples(), tier or tiers[0])
    whole = build_method(config, entry)  # also registers the states that a checkpoint contains
    progress = Checkpoints(run.place, entry.key, config.checkpoint).read_newest()
    downlinks = downlinks_of(_sent(whole, progress.server, arrived), [arrived])
    more = named_tokens(tokenizer, config.evaluation.generation.end_tokens, "evaluation.generation.end_tokens")
    worker = Worker()
    worker.setup(
        WorkerSetup(
            config.model_copy(update={"evaluation": for_classes(config, label_names)}),
            entry,
            run.architecture,
            label_names,
            own.pad_token_id,
            arrived.tier,
            end_token_ids=tuple(dict.fromkeys((*own.end_token_ids, *more))),
        )
    )
    # Like a client's task in the final pass, in which nothing is sent to the server.
    task = ClientTask(arrived, progress.server_round, downlinks[name], True, keep="adapter", shard=shard)
    result = worker.train(task)
    worker.adapter.model.eval()
    found = Restored(run.config, entry, worker.method, arrived, worker.adapter, tokenizer, label_names)
    return Newcomer(arrived, found, result.report)


def _sent(method: AnyMethod, server: Any, arrived: Client) -> Any:
    """Return what the server sends to the new client.

    Raises:
        ConfigError: the method's server knows only the clients that it began with.
    """
    try:
        return method.configure_train(admitted(method, server, arrived), [arrived])
    except KeyError as error:
        if error.args != (arrived.id,):
            raise
        raise ConfigError(
            f"method {type(method).__name__}: its server holds something of every client and knows none that arrives "
            "later; define admit(server, client), which returns a server that does"
        ) from error


def _in_this_process(config: Config, device: str | None) -> Config:
    """Return the configuration with which this process trains: plain torch, on its devices."""
    plain = TierConfig(share=1.0).engine
    tiers: Mapping[str, TierConfig] = {
        name: tier.model_copy(update={"engine": plain}) for name, tier in config.clients.tiers.items()
    }
    clients = config.clients.model_copy(update={"tiers": tiers})
    chosen = {} if device is None else {"device": device}
    return config.model_copy(update={"runtime": "inline", "clients": clients, **chosen})
