"""The model of a client, or of the server, as a finished run left it.

A client has two models. `personalised` is what its last local training made: the run's folder has all of its values.
`aggregated` is what it downloaded before that: the method's own code loads it once more, from the last checkpoint, up
to its first training. In the same way a client gets the server's own model.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedray.adapters.adapter import Adapter
from fedray.config import Config, MethodConfig, Precision, TierConfig
from fedray.data.load import load_federated_data
from fedray.data.shards import FederatedData
from fedray.errors import ConfigError, StateError, choices, nearest
from fedray.experiment.population import make_client
from fedray.experiment.prepare import split_labels
from fedray.federation.initial import common_head, draw_initial
from fedray.federation.tasks import downlinks_of
from fedray.methods.protocol import AnyMethod
from fedray.methods.registry import build_method
from fedray.models.architecture import architecture
from fedray.models.backbone import meta_backbone
from fedray.models.tokenizer import load_tokenizer, num_tokens
from fedray.results.run_result import RunResult
from fedray.storage.checkpoints import Checkpoints, Progress
from fedray.storage.client_states import StateFiles
from fedray.storage.paths import StoragePath, safe_name
from fedray.training.base_model import load_base_model
from fedray.training.engine import make_engine
from fedray.training.mixed_precision import mixed_precision
from fedray.training.trainer import EngineBackend, LocalTrainer
from fedray.training.training_context import TrainingContext
from fedray.types import Client, ClientId, Moment, Vector


@dataclass(frozen=True)
class Restored:
    """A model that is ready for forward passes.

    Attributes:
        config: the run's.
        entry: of the method.
        method: as the client's tier has it.
        client: whose model it is; None: the server's.
        adapter: with its values, in the model `adapter.model`.
        tokenizer: the model's.
        label_names: of the classes; empty unless the task is classification.
    """

    config: Config
    entry: MethodConfig
    method: AnyMethod
    client: Client | None
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...]

    @property
    def model(self) -> PreTrainedModel:
        """The base model with the adapter in it, in evaluation mode."""
        found: PreTrainedModel = self.adapter.model
        return found


def restore(
    run_folder: str | Path | StoragePath,
    method: str | None = None,
    client: ClientId | None = None,
    *,
    moment: Moment = "personalised",
    device: str | None = None,
) -> Restored:
    """Return a model of a finished run. Nothing in the run's folder changes.

    Args:
        method: its name or label in the run; may be left out if there is one only.
        client: whose model; None: the server's own.
        moment: of a client's model, after its last local training or before it.
        device: cuda or cpu; default a GPU of this machine, if there is one and the run was not told to use none.

    Raises:
        ConfigError: the run has no such method or client, the server has no model of its own, or the model cannot be
            loaded.
        StateError: the run has not finished, or its files are missing or damaged.
    """
    run = FinishedRun(run_folder)
    entry = run.entry(method)
    return run.restored(entry, None if client is None else run.client(entry, client), moment, device)


class FinishedRun:
    """What models are restored from; the data are loaded only where something needs them.

    Args:
        run: the result of a run, or its folder.

    Raises:
        StateError: no method of the run has finished, or its files are damaged.
    """

    def __init__(self, run: RunResult | str | Path | StoragePath):
        self.result = run if isinstance(run, RunResult) else RunResult.load(run)
        self.place, self.config = self.result.place, self.result.config

    def entry(self, method: str | None) -> MethodConfig:
        """Return the entry of a method that has finished.

        Raises:
            ConfigError: there is no such method, or none is named and there are several.
        """
        finished = [summary.method for summary in self.result.summaries]
        if method is None:
            if len(finished) > 1:
                raise ConfigError(f"method: {self.place} has {choices(finished)}; name one")
            method = finished[0]
        if method not in finished:
            raise ConfigError(
                f"method: {self.place} has no finished method {method!r}{nearest(method, finished)}; it has "
                f"{choices(finished)}"
            )
        return next(entry for entry in self.config.method if entry.key == method)

    def clients(self, entry: MethodConfig) -> dict[ClientId, Client]:
        """Return the clients that took part with a method, by id, as the method saw them."""
        table = self._took_part.query("method == @entry.key").sort_values("client")
        rows = zip(table["client"], table["num_examples"], table["tier"], strict=True)
        return {
            id: make_client(self.config.clients, id, index, int(examples), tier)
            for index, (id, examples, tier) in enumerate(rows)
        }

    @cached_property
    def _took_part(self) -> pd.DataFrame:
        """One row per method and client."""
        columns = ("method", "client", "num_examples", "tier")
        return self.result.clients(columns).drop_duplicates(["method", "client"])

    def client(self, entry: MethodConfig, id: ClientId) -> Client:
        """Return one client.

        Raises:
            ConfigError: there is none of this name.
        """
        found = self.clients(entry)
        if id not in found:
            raise ConfigError(f"client: {self.place} has no client {id!r}{nearest(id, found)}; it has {choices(found)}")
        return found[id]

    def holder(self, entry: MethodConfig) -> Client:
        """Return the client that holds most of the server's model, the first of equal ones."""
        clients = self.clients(entry).values()
        sizes = {}
        for tier in {client.tier for client in clients}:
            shapes = build_method(self.config, entry, tier).attach(meta_backbone(self.architecture, self.config.task))
            sizes[tier] = sum(shapes.layout(name).size for name in shapes.names)
        return min(clients, key=lambda client: (-sizes[client.tier], -client.capacity.get("mask_ratio", 1), client.id))

    def precision(self, tier: str) -> Precision:
        """Return the number type in which the tier holds the base model."""
        return self.config.clients.tier(tier).precision or self.config.model.dtype

    def base_model(self, precision: Precision, device: str | None = None) -> PreTrainedModel:
        """Return the frozen base model without an adapter.

        Raises:
            ConfigError: the device is a GPU, and there is none; or the weights cannot be loaded.
        """
        gpu = torch.cuda.is_available()
        place = device or ("cuda" if gpu and self.config.device != "cpu" else "cpu")
        if place.startswith("cuda") and not gpu:
            raise ConfigError(f"device: {place}, but torch finds no GPU on this machine; use cpu")
        plain = TierConfig(share=1.0, precision=precision)
        return load_base_model(self.config, self.architecture, precision, plain, place)

    def restored(
        self, entry: MethodConfig, client: Client | None, moment: Moment, device: str | None = None
    ) -> Restored:
        """Return the client's model at a moment; without a client the server's own."""
        if client is not None and moment == "personalised":
            return self.personalised(entry, client, device)
        return self.downloaded(entry, client, device)

    def personalised(self, entry: MethodConfig, client: Client, device: str | None = None) -> Restored:
        """Return the client's model after its last local training."""
        method = build_method(self.config, entry, client.tier)
        model = self.base_model(self.precision(client.tier), device)
        restored = self._attached(entry, method, client, model)
        adapter, tensors = restored.adapter, self._tensors(entry, client)
        for name in adapter.names:
            adapter.load(name, self._vector(adapter, name, tensors))
        return restored

    def downloaded(self, entry: MethodConfig, client: Client | None, device: str | None = None) -> Restored:
        """Return the client's model before its last local training; without a client the server's own."""
        whole, progress = self._progress(entry, client)
        holder = client or self.holder(entry)
        method = build_method(self.config, entry, holder.tier)
        model = self.base_model(self.precision(holder.tier), device)
        about = entry, method, holder.tier, self.label_names, str(model.device)
        head = common_head(model, self.config, self.architecture, *about)
        restored = self._attached(entry, method, client, model)
        initial = draw_initial(restored.adapter, self.config.seed, head)
        for name in restored.adapter.names:  # methods load what they train; the rest stays as it is here
            restored.adapter.load(name, initial.vectors[name])
        restored.adapter.fit(holder.capacity)
        ref = progress.client_states.get(holder.id)
        if ref is None:
            state = restored.method.init_client(initial, holder)
        else:
            (state,) = StateFiles(self.place / "states" / entry.key).read([ref])
        everyone = list(self.clients(entry).values())  # as in the final pass
        downlink = downlinks_of(whole.configure_train(progress.server, everyone), everyone)[holder.id]
        local = _UpToTraining(holder, progress.server_round, self.config.seed, lambda: self._trainer(restored, holder))
        with suppress(_Loaded):
            restored.method.train_client(restored.adapter, state, downlink.payload, local)
        restored.adapter.model.eval()
        return restored

    def check(self, entry: MethodConfig, client: Client | None, moment: Moment) -> None:
        """Check that the folder has what a model is restored from.

        Raises:
            ConfigError: the server has no model of its own.
            StateError: a file is missing, or the checkpoint is damaged.
        """
        if client is None or moment == "aggregated":
            self._progress(entry, client)
        elif not (file := self._file(entry, client)).is_file():
            raise StateError(f"{file}: does not exist; the client did not finish the final pass")

    def _progress(self, entry: MethodConfig, client: Client | None) -> tuple[AnyMethod, Progress]:
        """Return the whole method, and its last checkpoint."""
        whole = build_method(self.config, entry)  # also registers the states that a checkpoint contains
        progress = Checkpoints(self.place, entry.key, self.config.checkpoint).read_newest()
        if client is None and _personalised(whole, progress):
            raise ConfigError(
                f"{entry.key}: the server has no model of its own, because the clients' models differ; name a client"
            )
        return whole, progress

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.config.model)

    @cached_property
    def data(self) -> FederatedData:
        """The run's data.

        Raises:
            ConfigError: they have changed, or cannot be loaded.
        """
        found = load_federated_data(self.config, self.tokenizer)
        trained = self.result.summaries[0].data_sha256
        if found.fingerprint != trained:
            raise ConfigError(
                f"{self.place}: the data have changed since the run (data_sha256 {trained[:12]}, now "
                f"{found.fingerprint[:12]})"
            )
        return found

    @cached_property
    def architecture(self) -> PretrainedConfig:
        """The base model's configuration."""
        names = self.label_names
        model, _ = split_labels(self.config)
        tokens = num_tokens(self.tokenizer), self.tokenizer.pad_token_id
        return architecture(model, self.config.task, len(names), *tokens, names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, from the data; of other tasks there are none."""
        return self.data.label_names if self.config.task == "classification" else ()

    def _attached(
        self, entry: MethodConfig, method: AnyMethod, client: Client | None, model: PreTrainedModel
    ) -> Restored:
        """Attach the method's adapter to a base model."""
        adapter = mixed_precision(method.attach(model))
        adapter.model.eval()
        return Restored(self.config, entry, method, client, adapter, self.tokenizer, self.label_names)

    def _trainer(self, restored: Restored, client: Client) -> LocalTrainer:
        """Return what answers a method's questions about the client's examples."""
        section = self.config.section_for(restored.entry, client.tier)
        device = str(restored.model.device)
        context = TrainingContext(
            task=self.config.task,
            train=section.train,
            seed=self.config.seed,
            pad_token_id=self.data.pad_token_id,
            evaluation=self.config.evaluation,
            device=device,
            rounds=self.config.rounds,
        )
        engine = make_engine(restored.adapter, section.train, TierConfig(share=1.0), device)
        shard = self.data.shards[client.id]
        return LocalTrainer(EngineBackend(engine, context), shard, client, self.config.rounds, context, measures=False)

    def _file(self, entry: MethodConfig, client: Client) -> StoragePath:
        """Return the file of the client's model after its last local training."""
        return self.place / "adapters" / entry.key / "clients" / f"{safe_name(client.id)}.safetensors"

    def _tensors(self, entry: MethodConfig, client: Client) -> Mapping[str, Vector]:
        file = self._file(entry, client)
        try:
            found: Mapping[str, Vector] = load_tensors(file.read())
        except (OSError, SafetensorError) as error:
            raise StateError(f"{file}: cannot be read: {error}") from None
        return found

    def _vector(self, adapter: Adapter, group: str, tensors: Mapping[str, Vector]) -> Vector:
        layout = adapter.layout(group)
        missing = [slot.name for slot in layout.slots if f"{group}.{slot.name}" not in tensors]
        if missing:
            raise StateError(f"{self.place}: a client's model lacks {choices(missing, 5)} of the group {group!r}")
        return layout.flatten({slot.name: tensors[f"{group}.{slot.name}"] for slot in layout.slots})


def _personalised(method: AnyMethod, progress: Progress) -> bool:
    """Return whether the method's clients end up with models of their own: they keep arrays."""
    return bool(getattr(method, "personalised", any(ref.file for ref in progress.client_states.values())))


class _Loaded(Exception):
    """A method has loaded what it trains."""


class _UpToTraining:
    """A client's side of a round (`fedray.methods.protocol.Local`) that ends where training would begin.

    Args:
        trainer: makes what computes with the client's examples, for a method that asks before it trains.
    """

    def __init__(self, client: Client, server_round: int, seed: int, trainer: Callable[[], LocalTrainer]):
        self.client, self.server_round, self.seed, self.measures = client, server_round, seed, False
        self._make = trainer

    def train(self, *_: Any, **__: Any) -> Mapping[str, Vector]:
        raise _Loaded

    def measure(self) -> None:
        return None

    def record(self, name: str, value: Any) -> None:
        return None

    @cached_property
    def _trainer(self) -> LocalTrainer:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)
