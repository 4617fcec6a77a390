"""What each method trains and sends on each tier, from the model's configuration alone (no weights)."""

from collections.abc import Mapping
from dataclasses import replace

from transformers import PretrainedConfig

from fedray.config import Config, MethodConfig
from fedray.errors import ConfigError, TrainingError, choices
from fedray.methods.registry import build_method
from fedray.models.backbone import checkpoint_activations, meta_backbone
from fedray.planning.accounting import Attached, Cost, method_cost
from fedray.types import Client

TierCosts = Mapping[str, Cost]
"""What a method trains and sends, by tier."""


def costs(
    config: Config, arch: PretrainedConfig, clients: tuple[Client, ...], validation_examples: int = 1
) -> dict[str, TierCosts]:
    """Return what each method trains and sends on each tier that has clients.

    Args:
        arch: the model's configuration; its weights are not needed.
        validation_examples: validation examples of every client.

    Returns:
        The costs by method and tier.

    Raises:
        ConfigError: the model lacks a target module or layer, or a method does not fit the task.
    """
    found: dict[str, TierCosts] = {}
    for entry in config.method:
        whole = attached(config, arch, entry, None)
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
    if len(mine) == 1 < len(clients):  # the tier's only client: another one joins as its copy
        mine = [replace(mine[0], id=next(c.id for c in clients if c.id != mine[0].id)), *mine]
    device = config.clients.tier(tier)
    differs = device.activation_checkpointing or build_method(config, entry, tier) != whole.method
    try:
        held = attached(config, arch, entry, tier) if differs else whole
    except ConfigError as error:
        raise ConfigError(f"clients.tiers.{tier}: {error}") from None
    precision = device.precision or config.model.dtype
    if (trained := held.adapter.base_group()) and precision not in ("float32", "bfloat16"):
        loses = "which cannot train" if device.quantised else "which loses most updates"
        what = "the whole model" if trained == "full" else f"the base model's parameters of the group {trained!r}"
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: {what} would train in {precision}, {loses}; use float32, or "
            "bfloat16 for mixed precision"
        )
    try:
        cost = method_cost(whole, held, mine, config.seed, validation_examples)
    except ConfigError:
        raise
    except TrainingError as error:  # the data lack what training needs
        raise ConfigError(f"method {entry.key!r}: {error}") from None
    except Exception as error:  # a user's own method may not expect a tier that holds less
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: fails in a round on shapes: {type(error).__name__}: {error}"
        ) from error
    if cost.asked and not device.engine.steers:
        raise ConfigError(
            f"method {entry.key!r} on tier {tier!r}: it calls train() with {choices(sorted(cost.asked))}, which engine "
            f"{device.engine.label} cannot do with these settings; use engine: torch"
            + (", or offload: none" if device.engine.label == "deepspeed" else "")
        )
    return cost


def attached(config: Config, arch: PretrainedConfig, entry: MethodConfig, tier: str | None) -> Attached:
    """Return a method with its adapter on a model of shapes.

    Args:
        tier: on whose devices it trains; None: the whole method, as the driver has it.

    Raises:
        ConfigError: the method or its adapter does not fit the model or the tier.
    """
    method, model = build_method(config, entry, tier), meta_backbone(arch, config.task)
    if tier is not None and config.clients.tier(tier).activation_checkpointing:
        checkpoint_activations(model)
    return Attached(method, method.attach(model))
