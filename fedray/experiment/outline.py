"""Costs and memory footprints of an experiment without its data, if the configuration contains enough information."""

from transformers import PretrainedConfig

from fedray.config import Config, ModelConfig
from fedray.experiment.population import make_client
from fedray.experiment.prepare import check_engines, check_precision, prepare, split_labels
from fedray.models.architecture import architecture
from fedray.models.tokenizer import load_tokenizer
from fedray.planning.accounting import Cost
from fedray.planning.costs import TierCosts, costs
from fedray.planning.memory import Footprint, Tokens, predict


def costs_from_configuration(config: Config) -> dict[str, TierCosts]:
    """Return what each method trains and sends on each tier.

    The data are not loaded if the configuration says enough: for causal_lm and regression, and for classification with
    `model.config.num_labels`.

    Raises:
        ConfigError: as `prepare`.
    """
    model, num_labels = split_labels(config)
    if config.task == "classification" and num_labels is None:
        return dict(prepare(config).costs)
    return _outline(config, model, num_labels)[1]


def footprints_from_configuration(config: Config) -> dict[str, dict[str, tuple[Cost, Footprint]]]:
    """Return what each method costs on each tier, and how much memory an actor needs with it.

    The data are loaded only if `costs_from_configuration` would load them; otherwise the longest example is assumed to
    have data.max_length tokens.

    Raises:
        ConfigError: as `prepare`, or a step of this model cannot be traced.
    """
    check_precision(config)
    check_engines(config)
    model, num_labels = split_labels(config)
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
        entry.key: {
            tier: (cost, predict(config, arch, entry, tier, tokens, cost.asked))
            for tier, cost in found[entry.key].items()
        }
        for entry in config.method
    }


def _outline(
    config: Config, model: ModelConfig, num_labels: int | None
) -> tuple[PretrainedConfig, dict[str, TierCosts]]:
    """Return the architecture and the costs with two made-up clients of each tier."""
    names = [name for name in config.clients.tier_names for _ in range(2)]
    clients = tuple(make_client(config.clients, f"client_{i:03d}", i, 1, name) for i, name in enumerate(names))
    drawn = model.path == "random" and "vocab_size" not in model.config
    vocab_size = len(load_tokenizer(model)) if drawn else None
    arch = architecture(model, config.task, num_labels or 1, vocab_size, None)
    return arch, costs(config, arch, clients)
