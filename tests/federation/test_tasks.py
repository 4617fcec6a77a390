"""What a method's `configure_train` returned, as one downlink per client."""

import numpy as np
import pytest

from fedray.errors import TrainingError
from fedray.federation.tasks import downlinks_of
from fedray.methods.protocol import Broadcast
from fedray.types import Client

COHORT = [Client(id, index, 1) for index, id in enumerate("abc")]


def test_a_broadcast_is_one_downlink_for_all_its_clients() -> None:
    payload = np.zeros(3, np.float32)
    found = downlinks_of(Broadcast(payload, "abc"), COHORT)
    assert found["a"] is found["b"] is found["c"]
    assert (found["a"].payload is payload, found["a"].num_bytes) == (True, 12)


def test_broadcasts_and_single_payloads_have_keys_of_their_own() -> None:
    groups = downlinks_of([Broadcast(np.zeros(1), "ac"), Broadcast(np.zeros(2), "b")], COHORT)
    assert {id: downlink.key for id, downlink in groups.items()} == {"a": 0, "b": 1, "c": 0}
    single = downlinks_of({id: np.zeros(1) for id in "abc"}, COHORT)
    assert len({downlink.key for downlink in single.values()}) == 3


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (Broadcast(None, "ab"), "sends nothing to c;"),
        ({"a": None}, "sends nothing to b, c;"),
        (Broadcast(None, "abcb"), "sends twice to b;"),
        ([Broadcast(None, "abc"), Broadcast(None, "a")], "sends twice to a;"),
    ],
)
def test_every_client_of_the_cohort_needs_exactly_one_payload(sent: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        downlinks_of(sent, COHORT)  # type: ignore[arg-type]
