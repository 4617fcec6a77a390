"""Everything that can be known before an actor starts: the data, its partition, the clients, what each method costs.

Mistakes in an experiment are found here and reported as a ConfigError.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedray.config import Config, MethodConfig, ModelConfig, to_mapping, values_by_path, warmup_length
from fedray.data.load import load_federated_data
from fedray.data.shards import FederatedData
from fedray.errors import ConfigError, choices
from fedray.evaluation.metrics import check_metric, configured_metrics, for_classes, generates_text
from fedray.experiment.population import make_clients
from fedray.federation.participation import cohort_size
from fedray.federation.rounds import Federation, Pool
from fedray.federation.tasks import WorkerSetup
from fedray.methods.protocol import Initial
from fedray.methods.registry import build_method
from fedray.models.architecture import architecture
from fedray.models.backbone import max_positions, meta_backbone
from fedray.models.checkpoints.classes import has_own_head
from fedray.models.checkpoints.stored import stored_configuration
from fedray.models.tokenizer import load_tokenizer, named_tokens
from fedray.planning.costs import TierCosts, costs
from fedray.planning.memory import Footprint, predict
from fedray.storage.paths import StoragePath
from fedray.training.batch_shapes import largest_batches
from fedray.training.loop import total_steps
from fedray.types import Client, Split

EVALUATED: tuple[Split, ...] = ("validation", "test")
"""Splits that clients evaluate."""

log = logging.getLogger(__name__)

LoadData = Callable[[Config, PreTrainedTokenizerBase], FederatedData]


@dataclass(frozen=True)
class Prepared:
    """A checked experiment.

    Attributes:
        clients: in the order of their ids.
        costs: what each method trains and sends, by method and tier.
    """

    config: Config
    data: FederatedData
    clients: tuple[Client, ...]
    architecture: PretrainedConfig
    costs: Mapping[str, TierCosts]

    def worker_setups(self, entry: MethodConfig, folder: StoragePath | None = None) -> dict[str, WorkerSetup]:
        """Return what a worker needs for one method, by the tier that it serves.

        Args:
            folder: the run's folder; None if nothing is kept, as when tasks are only timed.
        """
        data = self.data
        evaluation = for_classes(self.config, data.label_names)
        setup = WorkerSetup(
            self.config.model_copy(update={"evaluation": evaluation, "tracking": ()}),  # actors do not need trackers
            entry,
            self.architecture,
            data.label_names,
            data.pad_token_id,
            folder=folder,
            end_token_ids=data.end_token_ids,
            common=data.common,
            personalised=self._personalised(entry),
        )
        costs = self.costs[entry.key]
        return {tier: replace(setup, tier=tier, uplink=costs[tier].shapes) for tier in self.cohorts()}

    def federation(self, entry: MethodConfig, initial: Initial, pool: Pool) -> Federation:
        """Return the federation of one method, before its first round."""
        costs = self.costs[entry.key]
        return Federation(
            self.config,
            entry.key,
            build_method(self.config, entry),
            self.clients,
            initial,
            pool,
            {tier: self.config.section_for(entry, tier).train for tier in costs},
            {tier: cost.uplink_bytes for tier, cost in costs.items()},
            measure_server="server" in self.config.evaluation.common
            and self.data.common is not None
            and not self._personalised(entry),
        )

    def _personalised(self, entry: MethodConfig) -> bool:
        """Return whether the method's clients end up with models of their own."""
        return any(cost.personalised for cost in self.costs[entry.key].values())

    def footprint(self, entry: MethodConfig, tier: str) -> Footprint:
        """Return how much memory an actor of the tier needs with one method.

        Raises:
            ConfigError: the memory cannot be predicted for this model.
        """
        config, cost = self.config, self.costs[entry.key][tier]
        shards = [self.data.shards[client.id] for client in self.clients if client.tier == tier]
        evaluated = [shard.tables[split] for shard in shards for split in {*EVALUATED, *cost.evaluated}]
        largest = largest_batches(
            shards,
            evaluated if self.data.common is None else [*evaluated, self.data.common],
            config.task,
            config.section_for(entry, tier).train,
            config.rounds,
            config.seed,
            configured_metrics(config),
            config.evaluation.batch_size,
        )
        return predict(config, self.architecture, entry, tier, largest, cost.asked)

    def cohorts(self) -> dict[str, int]:
        """Return by tier the most clients that a round can have; tiers without clients are left out."""
        sizes = Counter(client.tier for client in self.clients)
        largest = cohort_size(self.config.clients, len(self.clients))
        return {name: min(sizes[name], largest) for name in self.config.clients.tier_names if sizes[name]}


def prepare(config: Config, load: LoadData = load_federated_data) -> Prepared:
    """Load and check everything that the experiment needs.

    The notes of the data are logged as warnings.

    Args:
        load: loads the data of a configuration with its tokenizer.

    Raises:
        ConfigError: the configuration, the data and the model do not fit together.
    """
    check_precision(config)
    _check_gpus(config)
    check_own_classes(config)
    check_engines(config)
    for metric in configured_metrics(config):
        check_metric(metric, config.task)
    for entry in config.method:
        build_method(config, entry)
    tokenizer = load_tokenizer(config.model)
    more = named_tokens(tokenizer, config.evaluation.generation.end_tokens, "evaluation.generation.end_tokens")
    data = load(config, tokenizer)
    data = replace(data, end_token_ids=tuple(dict.fromkeys((*data.end_token_ids, *more))))
    for note in data.notes:
        log.warning("%s", note)
    _check_metrics(config, data)
    clients = make_clients(config.clients, data.shards, config.seed)
    if (per_round := config.clients.per_round) and per_round > len(clients):
        raise ConfigError(
            f"clients.per_round: {per_round} clients per round, but the data has only {len(clients)} clients"
        )
    _check_warmup(config, clients)
    model, num_labels = split_labels(config)
    if num_labels not in (None, len(data.label_names)):
        raise ConfigError(f"model.config.num_labels: {num_labels}, but the data has {len(data.label_names)} classes")
    names = data.label_names
    arch = architecture(model, config.task, len(names), data.vocab_size, data.pad_token_id, names)
    _check_length(config, max_positions(meta_backbone(arch, config.task)))
    fewest = min(shard.num_examples("validation") for shard in data.shards.values())
    found = costs(config, arch, clients, fewest)
    _note_drawn_heads(config, found)
    _note_masks(config)
    return Prepared(config, data, clients, arch, found)


def _check_metrics(config: Config, data: FederatedData) -> None:
    """Check that the metrics can be computed for the classes and the reference texts of the data.

    Raises:
        ConfigError: one cannot.
    """
    tables = [shard.tables[split] for shard in data.shards.values() for split in EVALUATED]
    tables += [] if data.common is None else [data.common]
    for metric in configured_metrics(config):
        metric.for_classes(data.label_names)
        if metric.reads == "texts":
            for table in tables:
                metric.check_references(table["answer"].to_pylist())


def _note_drawn_heads(config: Config, costs: Mapping[str, TierCosts]) -> None:
    """Log which methods replace the checkpoint's own task head by a random draw."""
    drawn = [key for key, tiers in costs.items() if any(cost.head == "frozen_random" for cost in tiers.values())]
    if drawn and config.model.path != "random" and has_own_head(stored_configuration(config.model)):
        log.warning(
            "%s: its own task head is not used by %s: head: frozen_random draws another one",
            config.model.path,
            choices(drawn),
        )


def _note_masks(config: Config) -> None:
    """Log which methods were told to mask rows that every tier holds."""
    if any(config.clients.tier(name).mask_ratio < 1 for name in config.clients.tier_names):
        return
    for entry in config.method:
        if "mask" in entry.hyperparameters and (mask := getattr(build_method(config, entry), "mask", "none")) != "none":
            log.warning("method %r: mask: %s has no effect, because no tier has a mask_ratio below 1", entry.key, mask)


def check_own_classes(config: Config) -> None:
    """Check that other processes can import the classes that the configuration names.

    Raises:
        ConfigError: on Ray, a class is defined in the script or the notebook that runs.
    """
    for path, value in values_by_path(to_mapping(config)).items():
        own = path.rpartition(".")[2] == "class" and str(value).startswith("__main__.")
        if own and config.runtime == "ray" and not path.startswith("callbacks."):  # callbacks stay in this process
            raise ConfigError(
                f"{path}: {value} is defined in the script that runs, which Ray's processes cannot import; move it to "
                "a file of its own, or use runtime: inline"
            )


def check_precision(config: Config) -> None:
    """Check that each tier's device supports its number type, and that what quantises is installed.

    Raises:
        ConfigError: a tier without a GPU would compute in float16, or bitsandbytes is missing.
    """
    for name in config.clients.tier_names:
        tier = config.clients.tier(name)
        if tier.quantised and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"tier {name!r}: precision: {tier.quantised}, but bitsandbytes is not installed: "
                "pip install 'fedray[quantised]'"
            )
        if tier.dtype(config.model.dtype) == "float16" and (config.device == "cpu" or tier.num_gpus == 0):
            raise ConfigError(f"tier {name!r}: float16 needs a GPU; on a CPU use bfloat16 or float32")


def _check_gpus(config: Config) -> None:
    """Check that this process has a GPU if the experiment needs one here, and log GPUs that would not be used.

    Raises:
        ConfigError: `runtime: inline` cannot train with `device: cuda`.
    """
    if config.runtime == "inline" and config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch finds no GPU on this machine; use device: auto or cpu")
    for name in config.clients.tier_names:
        if config.device == "cpu" and (gpus := config.clients.tier(name).num_gpus):
            log.warning("clients.num_gpus: %g on tier %r is ignored, because device is cpu", gpus, name)


def check_engines(config: Config) -> None:
    """Check that each tier's engine supports what the methods train.

    Raises:
        ConfigError: a tier's engine does not support a method's section `train`, or its settings contradict others.
    """
    for name in config.clients.tier_names:
        for entry in config.method:
            train = config.section_for(entry, name).train
            config.clients.tier(name).engine.check(train, f"clients.tiers.{name}")


def _check_length(config: Config, positions: int | None) -> None:
    """Check that the model can read the longest example and the text that is generated after it.

    Args:
        positions: the most tokens that the model reads; None if there is no limit.

    Raises:
        ConfigError: the example with the generated text has more tokens.
    """
    generates = generates_text(configured_metrics(config))
    generated = config.evaluation.max_new_tokens if generates else 0
    if positions is not None and config.data.max_length + generated > positions:
        after = f", plus evaluation.max_new_tokens: {generated}" if generated else ""
        raise ConfigError(
            f"data.max_length: {config.data.max_length}{after}, but the model reads at most {positions} tokens"
        )


def _check_warmup(config: Config, clients: Sequence[Client]) -> None:
    """Check that clients take more steps than their warm-up, and log how many do not.

    Raises:
        ConfigError: no client of a tier would ever train with the whole learning rate.
    """
    for entry in config.method:
        for tier in config.clients.tier_names:
            train = config.section_for(entry, tier).train
            rounds = config.rounds if train.schedule_over == "run" else 1
            steps = [total_steps(client.num_examples, train) * rounds for client in clients if client.tier == tier]
            longest = max(steps, default=0)
            short = sum(0 < number <= warmup_length(train.warmup_steps, number) for number in steps)
            if short == len(steps) > 0:
                raise ConfigError(
                    f"train.warmup_steps: {train.warmup_steps:g}, but with method {entry.key!r} no client of tier "
                    f"{tier!r} takes more than {longest} steps in a {train.schedule_over}; expected fewer"
                )
            if short:
                log.warning(
                    "train.warmup_steps: %g are all steps that %d of %d clients take in a %s with %s: their learning "
                    "rate stays below train.lr",
                    train.warmup_steps,
                    short,
                    len(steps),
                    train.schedule_over,
                    entry.key,
                )


def split_labels(config: Config) -> tuple[ModelConfig, int | None]:
    """Separate `num_labels` from the model's section: transformers derives it from the class names.

    Returns:
        The section without the number, and the number; None if the configuration does not give it.

    Raises:
        ConfigError: the number is not an integer of at least 2.
    """
    fields = dict(config.model.config)
    if config.task != "classification" or "num_labels" not in fields:
        return config.model, None
    number = fields.pop("num_labels")
    if type(number) is not int or number < 2:
        raise ConfigError(f"model.config.num_labels: expected a whole number of at least 2, got {number!r}")
    return config.model.model_copy(update={"config": fields}), number
