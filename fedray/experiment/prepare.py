"""Everything that can be known before an actor starts: the data, its partition, the clients, what each method costs.

Whatever is wrong with an experiment shows here, as one ConfigError.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedray.config import ClientsConfig, Config, MethodConfig, ModelConfig
from fedray.data import load_federated_data
from fedray.data.shards import FederatedData, Shard
from fedray.errors import ConfigError, TrainingError, choices, nearest
from fedray.evaluation.metrics import check_metric, configured_metric
from fedray.federation.participation import cohort_size
from fedray.federation.rounds import Federation, Pool
from fedray.federation.worker import WorkerSetup
from fedray.methods.protocol import Initial
from fedray.methods.registry import build_method
from fedray.models.backbone import architecture, checkpoint_activations, max_positions, meta_backbone
from fedray.models.tokenizer import load_tokenizer
from fedray.planning.accounting import Attached, Cost, method_cost
from fedray.planning.memory import Footprint, Tokens, predict
from fedray.randomness import keyed_rng
from fedray.storage.paths import StoragePath
from fedray.training.deepspeed_config import engine_config
from fedray.types import Client, ClientId, Split

EVALUATED: tuple[Split, ...] = ("validation", "test")

LoadData = Callable[[Config, PreTrainedTokenizerBase], FederatedData]

TierCosts = Mapping[str, Cost]
"""By name of the tier."""


@dataclass(frozen=True)
class Prepared:
    """An experiment that is known to fit together."""

    config: Config
    data: FederatedData
    clients: tuple[Client, ...]
    architecture: PretrainedConfig
    costs: Mapping[str, TierCosts]

    def worker_setups(self, entry: MethodConfig, folder: StoragePath | None = None) -> dict[str, WorkerSetup]:
        """Return what a worker needs for one method, by the tier that it serves.

        folder: the run's; None: for trials, of which nothing is kept.
        """
        data = self.data
        job = WorkerSetup(self.config, entry, self.architecture, data.label_names, data.pad_token_id, folder=folder)
        costs = self.costs[entry.key]
        return {tier: replace(job, tier=tier, uplink=costs[tier].shapes) for tier in self.cohorts()}

    def federation(self, entry: MethodConfig, initial: Initial, pool: Pool) -> Federation:
        """Return the federation of one method, before its first round."""
        costs = self.costs[entry.key]
        return Federation(
            self.config,
            build_method(self.config, entry),
            self.clients,
            initial,
            pool,
            {tier: self.config.section_for(entry, tier).train for tier in costs},
            {tier: cost.uplink_bytes for tier, cost in costs.items()},
        )

    def footprint(self, entry: MethodConfig, tier: str) -> Footprint:
        """Return what an actor of the tier holds with one method.

        Raises:
            ConfigError: it cannot be predicted for this model.
        """
        shards = [self.data.shards[client.id] for client in self.clients if client.tier == tier]
        training = max(shard.longest() for shard in shards)
        evaluation = max(shard.longest(split) for shard in shards for split in EVALUATED)
        tokens = Tokens(max(training, 1), max(evaluation, 1))
        return predict(self.config, self.architecture, entry, tier, tokens)

    def cohorts(self) -> dict[str, int]:
        """Return the most clients of each tier that a round can have; tiers without clients are left out."""
        sizes = Counter(client.tier for client in self.clients)
        largest = cohort_size(self.config.clients, len(self.clients))
        return {name: min(sizes[name], largest) for name in self.config.clients.tier_names if sizes[name]}


def prepare(config: Config, load: LoadData = load_federated_data) -> Prepared:
    """Load and check everything that the experiment needs.

    load: where the data come from.

    Raises:
        ConfigError: the configuration, the data or the model do not fit together.
    """
    _check_precision(config)
    _check_engines(config)
    check_metric(configured_metric(config.evaluation, config.task), config.task)
    for entry in config.method:
        build_method(config, entry)
    tokenizer = load_tokenizer(config.model)
    data = load(config, tokenizer)
    clients = make_clients(config.clients, data.shards, config.seed)
    if (asked := config.clients.per_round) and asked > len(clients):
        raise ConfigError(f"clients.per_round: {asked} clients per round, but the data has only {len(clients)} clients")
    model, num_labels = _split_labels(config)
    if num_labels not in (None, len(data.label_names)):
        raise ConfigError(f"model.config.num_labels: {num_labels}, but the data has {len(data.label_names)} classes")
    arch = architecture(model, config.task, len(data.label_names), data.vocab_size, data.pad_token_id)
    _check_length(config, max_positions(meta_backbone(arch, config.task)))
    fewest = min(shard.num_examples("validation") for shard in data.shards.values())
    return Prepared(config, data, clients, arch, costs(config, arch, clients, fewest))


def costs(
    config: Config, arch: PretrainedConfig, clients: tuple[Client, ...], validation_examples: int = 1
) -> dict[str, TierCosts]:
    """Return what each method trains and sends on each tier that has clients, from the model's configuration alone
    (no weights).

    Raises:
        ConfigError: a target module or layer that the model does not have, a method that does not fit the task.
    """
    found: dict[str, TierCosts] = {}
    for entry in config.method:
        whole = _attached(config, arch, entry, None)
        found[entry.key] = {
            tier: _cost_on(config, arch, entry, whole, tier, clients, validation_examples)
            for tier in config.clients.tier_names
            if any(client.tier == tier for client in clients)
        }
    return found


def _cost_on(
    config: Config,
    arch: PretrainedConfig,
    entry: MethodConfig,
    whole: Attached,
    tier: str,
    clients: tuple[Client, ...],
    validation_examples: int,
) -> Cost:
    mine = [client for client in clients if client.tier == tier][-2:]
    if len(mine) == 1 < len(clients):  # others there are: let them be like this one
        mine = [replace(mine[0], id=next(c.id for c in clients if c.id != mine[0].id)), *mine]
    device = config.clients.tier(tier)
    differs = device.activation_checkpointing or build_method(config, entry, tier) != whole.method
    try:
        held = _attached(config, arch, entry, tier) if differs else whole
    except ConfigError as error:
        raise ConfigError(f"clients.tiers.{tier}: {error}") from None
    precision = device.precision or config.model.dtype
    if "full" in held.adapter.names and precision != "float32":
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: the whole model would train in {precision}, which loses most "
            "updates; use float32"
        )
    try:
        return method_cost(whole, held, mine, config.seed, validation_examples)
    except ConfigError:
        raise
    except TrainingError as error:  # what training needs and the data does not have
        raise ConfigError(f"method {entry.key!r}: {error}") from None
    except Exception as error:  # whatever a user's own method does not expect: of a tier that holds less, say
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: fails in a round on shapes: {type(error).__name__}: {error}"
        ) from error


def _attached(config: Config, arch: PretrainedConfig, entry: MethodConfig, tier: str | None) -> Attached:
    method, model = build_method(config, entry, tier), meta_backbone(arch, config.task)
    if tier is not None and config.clients.tier(tier).activation_checkpointing:
        checkpoint_activations(model)
    return Attached(method, method.attach(model))


def costs_from_configuration(config: Config) -> dict[str, TierCosts]:
    """Return what each method trains and sends on each tier, without data where the model's configuration says enough:
    causal_lm, regression, or `model.config.num_labels`.

    Raises:
        ConfigError: as `prepare`.
    """
    model, num_labels = _split_labels(config)
    if config.task == "classification" and num_labels is None:
        return dict(prepare(config).costs)
    return _outline(config, model, num_labels)[1]


def footprints_from_configuration(config: Config) -> dict[str, dict[str, tuple[Cost, Footprint]]]:
    """Return what each method costs and what an actor holds with it on each tier; without data as
    `costs_from_configuration`, and then the longest example is data.max_length.

    Raises:
        ConfigError: as `prepare`, or a step of this model cannot be traced.
    """
    _check_precision(config)
    _check_engines(config)
    model, num_labels = _split_labels(config)
    if config.task == "classification" and num_labels is None:
        prepared = prepare(config)
        return {
            entry.key: {
                tier: (cost, prepared.footprint(entry, tier)) for tier, cost in prepared.costs[entry.key].items()
            }
            for entry in config.method
        }
    arch, found = _outline(config, model, num_labels)
    tokens = Tokens(config.data.max_length, config.data.max_length)
    return {
        entry.key: {tier: (cost, predict(config, arch, entry, tier, tokens)) for tier, cost in found[entry.key].items()}
        for entry in config.method
    }


def _outline(
    config: Config, model: ModelConfig, num_labels: int | None
) -> tuple[PretrainedConfig, dict[str, TierCosts]]:
    """Return the architecture and the costs, without data: two clients of each tier."""
    names = [name for name in config.clients.tier_names for _ in range(2)]
    clients = tuple(_client(config.clients, f"client_{i:03d}", i, 1, name) for i, name in enumerate(names))
    drawn = model.path == "random" and "vocab_size" not in model.config
    vocab_size = len(load_tokenizer(model)) if drawn else None
    arch = architecture(model, config.task, num_labels or 1, vocab_size, None)
    return arch, costs(config, arch, clients)


def _check_precision(config: Config) -> None:
    """Raises:
    ConfigError: a tier without GPU would compute in float16.
    """
    for name in config.clients.tier_names:
        tier = config.clients.tier(name)
        if (tier.precision or config.model.dtype) == "float16" and (config.device == "cpu" or tier.num_gpus == 0):
            raise ConfigError(f"tier {name!r}: float16 needs a GPU; on a CPU use bfloat16 or float32")


def _check_engines(config: Config) -> None:
    """Raises:
    ConfigError: a tier's `deepspeed` contradicts other settings, or cannot do what a method's section `train` says.
    """
    for name in config.clients.tier_names:
        tier = config.clients.tier(name)
        if tier.engine == "deepspeed":
            for entry in config.method:
                train = config.section_for(entry, name).train
                engine_config(train, tier.offload, tier.deepspeed, f"clients.tiers.{name}.deepspeed")


def _check_length(config: Config, positions: int | None) -> None:
    """Raises:
    ConfigError: the longest example, or what is generated after it, has more tokens than the model has positions.
    """
    generates = configured_metric(config.evaluation, config.task).reads == "texts"
    generated = config.evaluation.max_new_tokens if generates else 0
    if positions is not None and config.data.max_length + generated > positions:
        after = f", and evaluation.max_new_tokens {generated} after it" if generated else ""
        raise ConfigError(
            f"data.max_length: {config.data.max_length}{after}, but the model reads at most {positions} tokens"
        )


def _split_labels(config: Config) -> tuple[ModelConfig, int | None]:
    """Return the model's section without the number of classes (transformers derives it from their names), and that.

    Raises:
        ConfigError: it is not a whole number of at least 2.
    """
    fields = dict(config.model.config)
    if config.task != "classification" or "num_labels" not in fields:
        return config.model, None
    number = fields.pop("num_labels")
    if type(number) is not int or number < 2:
        raise ConfigError(f"model.config.num_labels: expected a whole number of at least 2, got {number!r}")
    return config.model.model_copy(update={"config": fields}), number


def make_clients(config: ClientsConfig, shards: Mapping[ClientId, Shard], seed: int) -> tuple[Client, ...]:
    """Return the clients in the order of their ids: those that a tier lists in that tier, the others by seed.

    Raises:
        ConfigError: a tier lists a client that there is not, or nobody has a place for the others.
    """
    tiers = _deal_tiers(config, sorted(shards), seed)
    return tuple(
        _client(config, id, index, shards[id].num_examples("train"), tiers[id])
        for index, id in enumerate(sorted(shards))
    )


def _client(config: ClientsConfig, id: ClientId, index: int, num_examples: int, tier: str) -> Client:
    device = config.tier(tier)
    return Client(id, index, num_examples, tier, device.capacity)


def _deal_tiers(config: ClientsConfig, ids: Sequence[ClientId], seed: int) -> dict[ClientId, str]:
    """Return each client's tier: each tier's share of those not listed, the rest by largest remainders, shuffled by
    seed."""
    if not config.tiers:
        return dict.fromkeys(ids, "default")
    listed = {id: name for name, tier in config.tiers.items() for id in tier.clients}
    for id, name in listed.items():
        if id not in ids:
            raise ConfigError(
                f"clients.tiers.{name}.clients: no client {id!r}{nearest(id, ids)}; there are {choices(ids)}"
            )
    others = [id for id in ids if id not in listed]
    exact = {name: tier.share * len(others) for name, tier in config.tiers.items() if tier.share is not None}
    if others and not exact:
        raise ConfigError(f"clients.tiers: no tier lists {choices(others)}; list them, or give one tier share: 1")
    sizes = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (sizes[name] - exact[name], name))[: len(others) - sum(sizes.values())]:
        sizes[name] += 1
    names = [name for name, size in sizes.items() for _ in range(size)]
    order = keyed_rng(seed, "tiers").permutation(len(others))
    return listed | {id: names[index] for id, index in zip(others, order, strict=True)}
