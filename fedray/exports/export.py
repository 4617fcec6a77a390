"""Exports the model of a finished run to a folder that other libraries open."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp
from pathlib import Path
from shlex import quote
from typing import Any

from fedray.adapters.portable import Form, form_of, single_lora
from fedray.config import Quantised
from fedray.errors import ConfigError, reason
from fedray.experiment.restore import FinishedRun, Restored
from fedray.exports.base import FOLDER, Base, base_of, merge, without_adapter, write_base
from fedray.exports.card import Opener, Origin, model_card, opening_code, reft_code
from fedray.exports.folders import pyreft_opens, write_loader, write_peft, write_pyreft
from fedray.models.quantised import dequantise_layers
from fedray.results.run_result import RunResult
from fedray.storage.paths import StoragePath
from fedray.training.mixed_precision import computes_in
from fedray.types import ClientId

NO_MERGE: Mapping[Form, str] = {
    "reft": "interventions edit some tokens' hidden states, which no weights do",
    "mixture": "its branches are weighed anew for every input, which no weights do",
}
"""Why a form cannot become weights."""

MIXTURE = (
    "The adapter has two branches whose weights depend on the input, so that it is no single LoRA or LoReFT: peft and "
    "pyreft cannot open this folder, and `load.py`, which comes with it, does."
)


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        opener: what opens it.
        notes: what a user should know, a sentence each.
    """

    folder: Path
    opener: Opener
    notes: tuple[str, ...]


def export(
    run: str | Path | StoragePath,
    method: str | None = None,
    client: ClientId | None = None,
    *,
    to: str | Path,
    merge: bool = False,
) -> Exported:
    """Write the model of a finished run to a folder that stock peft, pyreft or transformers opens.

    Args:
        method: its name or label in the run; may be left out if there is one only.
        client: whose model, as its last local training left it; None: the server's own.
        to: the folder, which must be empty or not exist.
        merge: write whole weights for transformers instead of an adapter.

    Raises:
        ConfigError: there is no such model, the folder is not empty, or the model has no such form; the message says
            why.
        StateError: the run has not finished, or its files are missing or damaged.
    """
    folder = check_target(to)
    found = FinishedRun(run)
    entry = found.entry(method)
    restored = found.restored(entry, None if client is None else found.client(entry, client), "personalised", "cpu")
    return export_restored(restored, folder, origin_of(found.result, restored, folder, merge), merge)


def export_restored(restored: Restored, folder: Path, origin: Origin, merged: bool = False) -> Exported:
    """Write a restored model to a folder. The model cannot be used afterwards.

    A quantised base model is dequantised: into its weights a LoRA is merged, and where the folder has weights of the
    base model, they are these.

    Raises:
        ConfigError: as `export`.
    """
    adapter, task, section = restored.adapter, restored.config.task, restored.config.model
    form = form_of(adapter)
    if merged and form in NO_MERGE:
        raise ConfigError(f"--merge: {restored.entry.key} cannot be merged: {NO_MERGE[form]}; leave it out")
    lora = single_lora(adapter) if form in ("lora", "folded") else None
    whole = merged or form == "full"
    quantised = dequantise_layers(restored.model)
    if merged and lora is not None:
        merge(adapter, lora)
    model = without_adapter(adapter)
    base = base_of(model, section, whole)
    notes = [_quantisation(quantised, base)] if quantised else []
    opener = _opener(form, restored, base.stock, whole)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {folder}: cannot be written: {reason(error)}") from None
    if (shorter := computes_in(restored.model)) is not None:
        notes.append(_mixed_precision(str(shorter)))
    code = opening_code(restored, opener, base)
    if opener == "transformers":
        write_base(folder, model, restored.tokenizer, base)
    else:
        write_base(folder / FOLDER, model, restored.tokenizer, base)
    if opener == "peft":
        assert lora is not None
        write_peft(folder, model, lora, base, task)
        notes.append(_arithmetic(form, lora.scale))
    elif opener == "pyreft":
        write_pyreft(folder, adapter, model, base)
        code += "\n\n" + reft_code(restored)
        notes.append("pyreft must be told which tokens to edit; the code shows it for one text.")
    elif opener == "load.py":
        write_loader(folder, None if whole else lora or adapter, model, base, task)
        notes.append(_why_loader(form, base.stock, type(model).__name__))
    if base.where is None and opener != "transformers":
        notes.append("The folder `base` has the weights of the base model, which can be loaded from nowhere else.")
    (folder / "README.md").write_text(model_card(restored, origin, opener, base, code, notes), "utf-8")
    return Exported(folder, opener, tuple(notes))


def check_target(to: str | Path) -> Path:
    """Return the folder to export to.

    Raises:
        ConfigError: it exists and is not empty.
    """
    folder = Path(to).expanduser().absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"--to {folder}: exists and is not empty; name another folder")
    return folder


def _opener(form: Form, restored: Restored, stock: bool, whole: bool) -> Opener:
    if whole:
        return "transformers" if stock else "load.py"
    if not stock or form == "mixture":
        return "load.py"
    if form == "reft":
        return "pyreft" if pyreft_opens(restored.adapter, restored.model) else "load.py"
    return "peft"


def _quantisation(precision: Quantised, base: Base) -> str:
    trained = f"The adapter was trained on a base model whose linear layers bitsandbytes rounded to {precision}."
    if base.where is None:
        return f"{trained} The weights in this folder are the rounded ones."
    settings = {
        "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
        "int8": "load_in_8bit=True",
    }
    return (
        f"{trained} The code above loads the weights before that, so its outputs differ by what was rounded; "
        f"`quantization_config=BitsAndBytesConfig({settings[precision]})` in the base model's `from_pretrained` rounds "
        "them, too."
    )


def _mixed_precision(dtype: str) -> str:
    return (
        f"The weights are float32, and were trained and evaluated in mixed precision: fedray's logits are those under "
        f"`torch.autocast(device, {dtype})`, but that a task head computes in float32."
    )


def _arithmetic(form: Form, scale: float) -> str:
    if form == "folded":
        return "The LoRA stands for several branches of fedray's: the same function up to float rounding (about 1e-6)."
    if frexp(scale)[0] == 0.5:  # a power of two
        return "In float32 the logits equal fedray's bit for bit."
    return "fedray and peft multiply by alpha / r in another order: in float32 the logits agree to about 1e-6."


def _why_loader(form: Form, stock: bool, model: str) -> str:
    if form == "mixture":
        return MIXTURE
    if not stock:
        return (
            "The task head reads pooled hidden states, which no class of transformers does: `load.py`, which comes "
            "with the folder, puts base model, adapter and head together."
        )
    return (
        f"pyreft does not know {model}, or cannot load interventions of this kind: `load.py`, which comes with the "
        "folder, opens it."
    )


def arguments_of(restored: Restored, folder: Path, merged: bool) -> str:
    """Return the options of the command that writes the folder again, as far as all such commands have them."""
    return f"--method {restored.entry.key} --to {folder.name}{' --merge' if merged else ''}"


def origin_of(run: RunResult, restored: Restored, folder: Path, merged: bool) -> Origin:
    """Return what the card says of a run's model."""
    summary, client = run[restored.entry.key], restored.client
    arguments = arguments_of(restored, folder, merged)
    if client is None:
        return Origin(
            f"The server's model after {summary.rounds} rounds of federated fine-tuning with {summary.clients} "
            "clients.",
            {f"{summary.metric_name}, mean over the clients' test examples": summary.aggregated_mean},
            {"data_sha256": summary.data_sha256},
            ["fedray run config.yaml --output RUN", f"fedray export RUN --server {arguments}"],
        )
    table = run.clients().query("method == @summary.method and phase == 'final' and client == @client.id")
    row: Any = table.iloc[0]
    return Origin(
        f"The model of the client `{client.id}` after {summary.rounds} rounds of federated fine-tuning with "
        f"{summary.clients} clients, and its own local training.",
        {
            f"{summary.metric_name}, the client's test examples": row["personalised_metric"],
            "loss, the client's test examples": row["personalised_loss"],
            f"{summary.metric_name} before the last local training": row["aggregated_metric"],
            f"{summary.metric_name}, mean over all clients": summary.personalised_mean,
        },
        {"training examples": client.num_examples, "tier": client.tier, "data_sha256": summary.data_sha256},
        [
            "fedray run config.yaml --output RUN",
            f"fedray export RUN --client {quote(client.id)} {arguments}",
        ],
    )
