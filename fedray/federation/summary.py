"""What an experiment says of each method at its end."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """One method's result. aggregated, personalised: metric on each client's test split in the final pass, right after
    aggregation and after the next local training; `weighted`: by test examples; `worst`: the client with the worst.
    uplink_bytes, downlink_bytes: over all rounds and clients, the final pass left out. late, dropped_out: clients that
    were asked and not aggregated, likewise; left_out: those that failed or sent what cannot be used.
    simulated_seconds: of all rounds on the tiers' devices. wall_seconds: on this machine, the final pass included.
    trainable_parameters: of a client; where tiers differ, the most. state_sha256: of the final server and client
    states. data_sha256: of the examples and who holds which."""

    method: str
    seed: int
    rounds: int
    clients: int
    head: str
    metric_name: str
    aggregated_mean: float | None
    personalised_mean: float | None
    personalised_weighted_mean: float | None
    personalised_worst: float | None
    trainable_parameters: int
    uplink_bytes: int
    downlink_bytes: int
    late: int
    dropped_out: int
    left_out: int
    simulated_seconds: float
    wall_seconds: float
    state_sha256: str
    data_sha256: str
