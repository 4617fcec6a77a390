"""How many client actors of each tier fit on a cluster's nodes, and how they are dealt to the tiers.

Amounts are counted in ten-thousandths, as Ray counts them: four actors of 0.25 GPUs fill one GPU exactly.
"""

from collections.abc import Mapping, Sequence

from fedray.config import ClientsConfig

Amounts = Mapping[str, float]
"""Resources by name: CPU, GPU, memory (bytes), and any other."""

UNIT = 10_000


def requests(clients: ClientsConfig, tiers: Sequence[str], nodes: Sequence[Amounts]) -> dict[str, dict[str, float]]:
    """Return what one actor of each tier asks for.

    Where `num_cpus` is left out it is 1, or an equal share of the CPUs where there are fewer of them than tiers.
    GPUs that were not asked for are dealt later (`share_gpus`), when the number of actors is known.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    fair = min(1.0, int(UNIT * cpus / len(tiers)) / UNIT) or 1.0
    asked = {}
    for name in tiers:
        tier = clients.tier(name)
        amounts = {"CPU": fair if tier.num_cpus is None else tier.num_cpus, "GPU": tier.num_gpus or 0.0}
        asked[name] = {**amounts, "memory": float(tier.memory or 0), **tier.resources}
    return asked


def fits(asked: Amounts, node: Amounts) -> bool:
    """Return whether one actor has room on an otherwise empty node."""
    return all(_units(amount) <= _units(node.get(name, 0.0)) for name, amount in asked.items())


def fit_together(asked: Mapping[str, Amounts], nodes: Sequence[Amounts]) -> bool:
    """Return whether one actor of every tier has room at the same time."""
    free = [{name: _units(amount) for name, amount in node.items()} for node in nodes]
    return all(_place(amounts, free) for amounts in asked.values())


def allot(
    asked: Mapping[str, Amounts], most: Mapping[str, int], fixed: Mapping[str, int | None], nodes: Sequence[Amounts]
) -> dict[str, int]:
    """Return the number of actors of each tier: the fixed one, else at least one, and then one after another to the
    tier with the most clients per actor, as long as one of the nodes has room.

    most: the clients of each tier that a round can have; more actors would idle.
    """
    free = [{name: _units(amount) for name, amount in node.items()} for node in nodes]
    sizes = {name: fixed[name] or 1 for name in asked}
    for name, size in sizes.items():
        for _ in range(size):
            _place(asked[name], free)
    growing = {name for name in asked if fixed[name] is None}
    while growing:
        name = max(growing, key=lambda name: (most[name] / sizes[name], name))
        if sizes[name] < most[name] and _place(asked[name], free):
            sizes[name] += 1
        else:
            growing.remove(name)
    return sizes


def share_gpus(gpus: float, asked: Mapping[str, Amounts], sizes: Mapping[str, int], sharing: Sequence[str]) -> float:
    """Return the fraction of a GPU for each actor of the tiers that share what the others leave, at most 1."""
    left = gpus - sum(asked[name].get("GPU", 0.0) * size for name, size in sizes.items() if name not in sharing)
    actors = sum(sizes[name] for name in sharing)
    return min(1.0, max(0, int(UNIT * left / actors)) / UNIT) if actors else 0.0


def _place(asked: Amounts, free: list[dict[str, int]]) -> bool:
    """Take one actor's room from the first node that has it; return whether there was one."""
    wanted = {name: _units(amount) for name, amount in asked.items() if amount}
    for node in free:
        if all(node.get(name, 0) >= amount for name, amount in wanted.items()):
            for name, amount in wanted.items():
                node[name] -= amount
            return True
    return False


def _units(amount: float) -> int:
    return round(amount * UNIT)
