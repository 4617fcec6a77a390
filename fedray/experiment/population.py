"""The clients of an experiment, and their tiers."""

from collections.abc import Mapping, Sequence

from fedray.config import ClientsConfig
from fedray.data.shards import Shard
from fedray.errors import ConfigError, choices, nearest
from fedray.randomness import keyed_rng
from fedray.types import Client, ClientId


def make_clients(config: ClientsConfig, shards: Mapping[ClientId, Shard], seed: int) -> tuple[Client, ...]:
    """Return the clients in the order of their ids. A client that a tier lists is in that tier; the others are assigned
    by seed.

    Raises:
        ConfigError: a tier lists a client that does not exist, or no tier takes the clients that none lists.
    """
    tiers = _assign_tiers(config, sorted(shards), seed)
    return tuple(
        make_client(config, id, index, shards[id].num_examples("train"), tiers[id])
        for index, id in enumerate(sorted(shards))
    )


def make_client(config: ClientsConfig, id: ClientId, index: int, num_examples: int, tier: str) -> Client:
    """Return a client with the capacity of its tier."""
    device = config.tier(tier)
    return Client(id, index, num_examples, tier, device.capacity)


def _assign_tiers(config: ClientsConfig, ids: Sequence[ClientId], seed: int) -> dict[ClientId, str]:
    """Return each client's tier. Clients that no tier lists are shuffled by seed and split by the tiers' shares, which
    are rounded by largest remainders."""
    if not config.tiers:
        return dict.fromkeys(ids, "default")
    listed = {id: name for name, tier in config.tiers.items() for id in tier.clients}
    for id, name in listed.items():
        if id not in ids:
            raise ConfigError(
                f"clients.tiers.{name}.clients: no client {id!r}{nearest(id, ids)}; the clients are {choices(ids)}"
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
