"""Which clients of a cohort take part in a round: some drop out, and stragglers miss the deadline.

A client's update arrives, simulated on its tier's device,

    t_k = latency + 8 · bytes_down / (10⁶ · down_mbps) + examples · example_seconds / speed
        + latency + 8 · bytes_up / (10⁶ · up_mbps)

seconds after the round's start; nothing sleeps. Participation follows from `clients.example_seconds`, which the
resolved configuration holds, and never from the speed of this machine. A client that drops out or is a straggler does
not train in that round: its private state stays as it was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedray.config import ClientsConfig, TierConfig, TrainConfig
from fedray.randomness import keyed_rng
from fedray.types import Client, ClientId


@dataclass(frozen=True)
class Participation:
    """How a round's cohort splits.

    Attributes:
        participants: clients that train and are aggregated.
        stragglers: clients whose updates would arrive after the deadline, or after enough others.
        dropped_out: clients that left the round.
        arrivals: simulated seconds of participants and stragglers; empty if no cost was calibrated.
        seconds: simulated seconds of the whole round; None if no cost was calibrated.
    """

    participants: tuple[Client, ...]
    stragglers: tuple[Client, ...]
    dropped_out: tuple[Client, ...]
    arrivals: Mapping[ClientId, float]
    seconds: float | None


def device_seconds(tier: TierConfig, training: float, down_bytes: int, up_bytes: int) -> float:
    """Return the seconds from the round's start to the arrival of a client's update.

    Args:
        training: seconds of training on the reference device.
    """
    return (
        _transfer(down_bytes, tier.down_mbps, tier.latency_s)
        + training / tier.speed
        + _transfer(up_bytes, tier.up_mbps, tier.latency_s)
    )


def examples_trained(num_examples: int, train: TrainConfig) -> float:
    """Return how many examples a client trains on in a round, repetitions included."""
    longest = math.inf if train.max_steps is None else train.max_steps * train.batch_size * train.accumulation
    return min(train.epochs * num_examples, longest)


def cohort_size(clients: ClientsConfig, total: int) -> int:
    """Return how many clients a round selects: `per_round` plus the share `over_selection`, and at most all clients."""
    return min(total, math.ceil((clients.per_round or total) * (1 + clients.over_selection) - 1e-9))


def select_participants(
    clients: ClientsConfig,
    seed: int,
    server_round: int,
    cohort: Sequence[Client],
    total: int,
    train: Mapping[str, TrainConfig],
    down_bytes: Mapping[ClientId, int],
    up_bytes: Mapping[str, int],
) -> Participation:
    """Return which clients of a cohort take part in the round.

    Args:
        total: number of all clients.
        train, up_bytes: by tier, how a client trains and how many bytes it sends.
        down_bytes: what each client receives.
    """
    tiers = {name: clients.tier(name) for name in {client.tier for client in cohort}}
    staying: list[Client] = []
    leaving: list[Client] = []
    for client in cohort:
        chance = tiers[client.tier].dropout
        left = chance > 0 and keyed_rng(seed, "dropout of clients", server_round, client.id).random() < chance
        (leaving if left else staying).append(client)
    if clients.example_seconds is None:
        return Participation(tuple(staying), (), tuple(leaving), {}, None)
    seconds = {
        client.id: device_seconds(
            tiers[client.tier],
            clients.example_seconds * examples_trained(client.num_examples, train[client.tier]),
            down_bytes[client.id],
            up_bytes[client.tier],
        )
        for client in staying
    }
    deadline = math.inf if clients.deadline_s is None else clients.deadline_s
    wanted = clients.per_round or total
    in_time = sorted((seconds[client.id], client.id) for client in staying if seconds[client.id] <= deadline)[:wanted]
    chosen = {id for _, id in in_time}
    participants = tuple(client for client in staying if client.id in chosen)
    stragglers = tuple(client for client in staying if client.id not in chosen)
    last = max((arrival for arrival, _ in in_time), default=0.0)
    waited = deadline if len(participants) < min(wanted, len(cohort)) and deadline < math.inf else last
    return Participation(participants, stragglers, tuple(leaving), seconds, waited)


def _transfer(num_bytes: int, mbps: float | None, latency: float) -> float:
    return latency + (0.0 if mbps is None else 8 * num_bytes / (1e6 * mbps))
