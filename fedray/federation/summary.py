"""The summary of a method at the end of an experiment."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """The result of one method. Sums are over all rounds and clients, without the final pass.

    Attributes:
        head: how the method treats the task head; `-` if there is none.
        aggregated_mean: mean over clients of the metric on each client's test split in the final pass, right after
            aggregation.
        personalised_mean: the same mean after the local training that follows.
        personalised_weighted_mean: the same mean, weighted by test examples.
        personalised_worst: the metric of the client with the worst one after local training.
        validation_...: the same on the validation splits, by which sweeps select; None without validation examples.
        trainable_parameters: parameters that a client trains; the most if tiers differ.
        uplink_bytes, downlink_bytes: bytes sent, summed.
        late, dropped_out: selected clients that were stragglers or dropped out, summed.
        left_out: clients that failed or sent an unusable update, summed.
        simulated_seconds: duration of all rounds on the tiers' devices.
        wall_seconds: duration on this machine, including the final pass.
        state_sha256: fingerprint of the final server and client states.
        data_sha256: fingerprint of the examples and of their assignment to clients.
    """

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
    validation_aggregated_mean: float | None = None
    validation_personalised_mean: float | None = None
    validation_personalised_weighted_mean: float | None = None
    validation_personalised_worst: float | None = None
