"""A client that arrives after the run, trained, evaluated, and exported."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from transformers import PreTrainedModel

from fedray.experiment.newcomer import Newcomer, train_newcomer
from fedray.exports.card import Origin
from fedray.exports.export import Exported, arguments_of, check_target, export_restored
from fedray.storage.paths import StoragePath
from fedray.training.trainer import ClientReport
from fedray.types import Client, ClientId


@dataclass(frozen=True)
class Personalised:
    """A client that arrived after the run.

    Attributes:
        report: what was trained and measured: `aggregated` with what the server holds, `personalised` after the local
            training.
        model: ready for inference; None if it was exported.
        exported: where the model is; None if it was not exported.
    """

    client: Client
    report: ClientReport
    model: PreTrainedModel | None
    exported: Exported | None


def personalise(
    run: str | Path | StoragePath,
    method: str | None = None,
    *,
    data: str | Path,
    test: str | Path | None = None,
    client: ClientId | None = None,
    tier: str | None = None,
    to: str | Path | None = None,
    merge: bool = False,
    device: str | None = None,
) -> Personalised:
    """Train a client that arrives after the run: it starts from what the server holds, trains on its own examples as
    the run's clients do in a round, and is evaluated before and after.

    Args:
        run: the run's folder, in which nothing changes.
        method: its name or label in the run; may be left out if there is one only.
        data: a file of the client's examples, with the columns of the run's data.
        test: a file with its test examples; None: the run's share of `data` is held out.
        client: its name; default that of the file.
        tier: of the run's tiers; default the first.
        to: a folder to export the model to, see `export`; the model is then there, and not in the result.
        merge: export whole weights instead of an adapter.
        device: cuda or cpu; default what the configuration says, with this machine's devices.

    Raises:
        ConfigError: the run has no such method or tier, has a client of that name, the data do not fit it, or the
            model cannot be exported.
        StateError: the run has not finished, or has no checkpoint.
        TrainingError: the client cannot train.
    """
    folder = None if to is None else check_target(to)
    found = train_newcomer(run, method, data, test=test, client=client, tier=tier, device=device)
    if folder is None:
        return Personalised(found.client, found.report, found.restored.model, None)
    origin = _origin(found, Path(data).name, folder, merge)
    exported = export_restored(found.restored, folder, origin, merge)
    return Personalised(found.client, found.report, None, exported)


def _origin(newcomer: Newcomer, data: str, folder: Path, merged: bool) -> Origin:
    """Return what the card says of a client that arrived after the run."""
    restored, report, client = newcomer.restored, newcomer.report, newcomer.client
    before, after = report.evaluation("aggregated"), report.evaluation("personalised")
    scores = {
        f"{label}, {number} test examples, {when} local training": value
        for when, found in (("before", before), ("after", after))
        if found is not None
        for label, value in found.metrics.items()
        for number in (found.num_examples,)
    }
    arguments = arguments_of(restored, folder, merged)
    return Origin(
        f"The model of the client `{client.id}`, which arrived after {restored.config.rounds} rounds of federated "
        "fine-tuning: it started from what the server held, and trained on its own examples.",
        scores,
        {"training examples": client.num_examples, "tier": client.tier},
        [
            "fedray run config.yaml --output RUN",
            f"fedray personalise RUN --client {quote(client.id)} --data {quote(data)} {arguments}",
        ],
    )
