"""How many client actors fit on a cluster's nodes, and how many of them each tier gets.

Amounts are counted in ten-thousandths, as Ray counts them: four actors of 0.25 GPUs fill one GPU exactly. A fraction of
a GPU is always on one GPU: two GPUs hold four actors of 0.4, not five. In a tier whose clients are silos, an actor is
several workers, each with the resources that the tier requests; they may run on several nodes.
"""

import copy
from collections.abc import Collection, Mapping, Sequence

from fedray.config import ClientsConfig

Amounts = Mapping[str, float]
"""Resources by name: CPU, GPU, memory (bytes), and any other."""

UNIT = 10_000
"""Parts of a resource that are counted."""

SINGLE_PROCESSES: Mapping[str, int] = {}
"""Workers per actor by tier if every actor is a single process."""


def requests(clients: ClientsConfig, tiers: Sequence[str], nodes: Sequence[Amounts]) -> dict[str, dict[str, float]]:
    """Return what one actor (or worker of a silo) of each tier requests.

    If `num_cpus` is left out, it is 1, or an equal share of the CPUs if there are fewer of them than tiers. GPUs that
    the configuration does not mention are shared out later (`allot_with_gpus`), when the number of actors is known;
    only the workers of a silo get a whole GPU each, if there are enough.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    fair = min(1.0, int(UNIT * cpus / sum(clients.tier(name).workers for name in tiers)) / UNIT) or 1.0
    requested = {}
    for name in tiers:
        tier = clients.tier(name)
        whole = float(tier.num_gpus is None and 1 < tier.workers <= gpus)
        amounts = {"CPU": fair if tier.num_cpus is None else tier.num_cpus, "GPU": tier.num_gpus or whole}
        requested[name] = {**amounts, "memory": float(tier.memory or 0), **tier.resources}
    return requested


def fits(requested: Amounts, node: Amounts) -> bool:
    """Return whether one actor fits on an otherwise empty node."""
    return _Room(node).place(requested)


def fit_together(
    requested: Mapping[str, Amounts], nodes: Sequence[Amounts], workers: Mapping[str, int] = SINGLE_PROCESSES
) -> bool:
    """Return whether one actor of every tier fits at the same time.

    Args:
        workers: processes per actor, by tier; 1 if a tier is missing.
    """
    rooms = [_Room(node) for node in nodes]
    return all(_place(requested[name], rooms, workers.get(name, 1)) for name in _largest_first(requested))


def allot(
    requested: Mapping[str, Amounts],
    most: Mapping[str, int],
    fixed: Mapping[str, int | None],
    nodes: Sequence[Amounts],
    workers: Mapping[str, int] = SINGLE_PROCESSES,
) -> dict[str, int]:
    """Return the number of actors of each tier.

    Each tier gets at least one; tiers with a fixed number then get up to that many; the others then get one more each
    time they have the most clients per actor, as long as a node has room.

    Args:
        most: by tier, the most clients that a round can have; more actors would idle.
        fixed: by tier, the configured number of actors, if any.
        nodes: resources of each node, including nodes that can be added.
        workers: processes per actor, by tier.
    """
    rooms = [_Room(node) for node in nodes]
    sizes = dict.fromkeys(requested, 1)
    for name in _largest_first(requested):
        _place(requested[name], rooms, workers.get(name, 1))
    wanted = {name: most[name] if fixed[name] is None else fixed[name] or 1 for name in requested}
    for growing in ({name for name in requested if fixed[name]}, {name for name in requested if not fixed[name]}):
        while growing:
            name = max(growing, key=lambda name: (most[name] / sizes[name], name))
            if sizes[name] < wanted[name] and _place(requested[name], rooms, workers.get(name, 1)):
                sizes[name] += 1
            else:
                growing.remove(name)
    return sizes


def allot_shared(
    requested: Mapping[str, Amounts],
    most: Mapping[str, int],
    fixed: Mapping[str, int | None],
    nodes: Sequence[Amounts],
    num_pools: int,
    workers: Mapping[str, int] = SINGLE_PROCESSES,
) -> dict[str, int]:
    """Return the number of actors of each tier that each of `num_pools` equal pools may have, so that all pools fit
    together. The other arguments are those of `allot`."""
    sizes = {name: fixed[name] or 1 for name in requested}
    growing = {name for name in requested if not fixed[name]}
    while growing:
        name = max(growing, key=lambda name: (most[name] / sizes[name], name))
        larger = {**sizes, name: sizes[name] + 1}
        if sizes[name] < most[name] and fit_times(requested, larger, num_pools, nodes, workers):
            sizes = larger
        else:
            growing.remove(name)
    return sizes


def fit_times(
    requested: Mapping[str, Amounts],
    sizes: Mapping[str, int],
    times: int,
    nodes: Sequence[Amounts],
    workers: Mapping[str, int] = SINGLE_PROCESSES,
) -> bool:
    """Return whether `times` copies of a pool fit at the same time.

    Args:
        sizes: actors of each tier in one pool.
    """
    each = [(f"{name} {i}", name) for name in requested for i in range(times * sizes[name])]
    return fit_together(
        {key: requested[name] for key, name in each}, nodes, {key: workers.get(name, 1) for key, name in each}
    )


def allot_with_gpus(
    requested: Mapping[str, Amounts],
    most: Mapping[str, int],
    fixed: Mapping[str, int | None],
    nodes: Sequence[Amounts],
    sharing: Collection[str],
    workers: Mapping[str, int] = SINGLE_PROCESSES,
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Return the number of actors of each tier and what each requests. The tiers in `sharing` get equal shares of the
    GPUs that the others leave free: the largest shares with which all actors fit. The other arguments are those of
    `allot`."""
    least = {name: {**requested[name], **({"GPU": 1 / UNIT} if name in sharing else {})} for name in requested}
    if sharing and fit_together(least, nodes, workers):
        sizes = allot(least, most, fixed, nodes, workers)
        for part in range(1, sum(sizes.values()) + 1):
            shared = int(UNIT / part) / UNIT
            final = {name: {**least[name], **({"GPU": shared} if name in sharing else {})} for name in requested}
            if fit_together(final, nodes, workers) and allot(final, most, fixed, nodes, workers) == sizes:
                return sizes, final
    plain = {name: dict(amounts) for name, amounts in requested.items()}
    return allot(plain, most, fixed, nodes, workers), plain


def _largest_first(requested: Mapping[str, Amounts]) -> list[str]:
    return sorted(requested, key=lambda name: [-requested[name].get(kind, 0.0) for kind in ("GPU", "CPU", "memory")])


class _Room:
    """The free resources of a node."""

    def __init__(self, node: Amounts) -> None:
        self._free = {name: _units(amount) for name, amount in node.items() if name != "GPU"}
        whole, part = divmod(_units(node.get("GPU", 0.0)), UNIT)
        self._gpus = [UNIT] * whole + [part] * (part > 0)

    def place(self, requested: Amounts) -> bool:
        """Reserve an actor's resources if the node has all of them; return whether it has."""
        wanted = {name: _units(amount) for name, amount in requested.items() if amount and name != "GPU"}
        gpus = self._fullest(_units(requested.get("GPU", 0.0)))
        if gpus is None or any(self._free.get(name, 0) < amount for name, amount in wanted.items()):
            return False
        for name, amount in wanted.items():
            self._free[name] -= amount
        for index, amount in gpus.items():
            self._gpus[index] -= amount
        return True

    def left(self) -> tuple[int, int]:
        """Return the free GPUs and CPUs. Actors without a GPU go to nodes with few free GPUs first."""
        return sum(self._gpus), self._free.get("CPU", 0)

    def _fullest(self, wanted: int) -> dict[int, int] | None:
        """Return the amount to take from each GPU: whole GPUs, or a share of the fullest GPU that has it free; None if
        the node has no room."""
        if wanted >= UNIT:
            whole = [index for index, free in enumerate(self._gpus) if free == UNIT][: wanted // UNIT]
            return dict.fromkeys(whole, UNIT) if len(whole) * UNIT == wanted else None
        able = [(free, index) for index, free in enumerate(self._gpus) if free >= wanted]
        if wanted == 0 or not able:
            return {} if wanted == 0 else None
        return {min(able)[1]: wanted}


def _place(requested: Amounts, rooms: list[_Room], workers: int = 1) -> bool:
    """Place one actor, each of its workers on the fullest node that has room; return whether all of them fit."""
    if workers > 1:
        tried = copy.deepcopy(rooms)
        placed = all(_place(requested, tried) for _ in range(workers))
        rooms[:] = tried if placed else rooms
        return placed
    return any(room.place(requested) for room in sorted(rooms, key=_Room.left))


def _units(amount: float) -> int:
    return round(amount * UNIT)
