"""Costs of an experiment without its data, if the configuration contains enough information, and memory footprints."""

import logging

from transformers import PretrainedConfig

from fedray.config import Config, MethodConfig, ModelConfig
from fedray.errors import DataError
from fedray.evaluation.metrics import configured_metrics
from fedray.experiment.population import make_client
from fedray.experiment.prepare import check_engines, check_precision, prepare, split_labels
from fedray.models.architecture import architecture
from fedray.models.tokenizer import load_tokenizer
from fedray.planning.accounting import Cost
from fedray.planning.costs import TierCosts, costs
from fedray.planning.memory import Footprint, predict
from fedray.training.batch_shapes import LargestBatches

log = logging.getLogger(__name__)


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


def footprints(config: Config, read_data: bool = True) -> dict[str, dict[str, tuple[Cost, Footprint]]]:
    """Return what each method costs on each tier, and how much memory an actor needs with it.

    Args:
        read_data: whether batches are those of the data. Otherwise, and with a warning where the data cannot be read,
            all are full batches of examples with data.max_length tokens and a loss wherever there can be one; then the
            data are read only if `costs_from_configuration` would read them.

    Raises:
        ConfigError: as `prepare`, or a step of this model cannot be traced.
    """
    check_precision(config)
    check_engines(config)
    model, num_labels = split_labels(config)
    needed = config.task == "classification" and num_labels is None
    if read_data or needed:
        try:
            prepared = prepare(config)
        except DataError as error:
            if needed:
                raise
            log.warning("memory is predicted without the data, as if all examples were as long as can be: %s", error)
        else:
            return {
                entry.key: {
                    tier: (cost, prepared.footprint(entry, tier)) for tier, cost in prepared.costs[entry.key].items()
                }
                for entry in config.method
            }
    arch, found = _outline(config, model, num_labels)

    def largest(entry: MethodConfig, tier: str) -> LargestBatches:
        sizes = config.section_for(entry, tier).train.batch_size, config.evaluation.batch_size
        return LargestBatches.full(config.task, *sizes, config.data.max_length, configured_metrics(config))

    return {
        entry.key: {
            tier: (cost, predict(config, arch, entry, tier, largest(entry, tier), cost.asked))
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
