"""FedPer and FedIT are FedAvg under their names: the first with a private head, the second on LoRA alone."""

import numpy as np
import pytest

from fedray.errors import ConfigError
from fedray.storage.state_tree import sha256


def test_fedper_is_fedavg_with_a_private_head(start):
    run, same = start("fedper"), start({"name": "fedavg", "head": "local"})
    assert [run.round().results[0].uplink_bytes for _ in range(2)] == [4 * run.initial.layouts["lora"].size] * 2
    same.rounds(2)
    assert np.array_equal(run.server.shared.adapter, same.server.shared.adapter)
    for client in run.prepared.clients:
        assert np.array_equal(run.state(client.id).head, same.state(client.id).head)


@pytest.mark.parametrize("head", ["shared", "frozen_label_text"])
def test_its_head_is_private_whatever_the_others_is(start, head):
    run = start("fedper", head=head)
    run.round()
    assert run.server.shared.head is None
    assert len({run.state(client.id).head.tobytes() for client in run.prepared.clients}) == 3
    with pytest.raises(ConfigError, match="this method's head is always 'local'; leave it out"):
        start({"name": "fedper", "head": head})


def test_fedit_is_fedavg_on_lora(start):
    run, same = start("fedit"), start("fedavg")
    run.rounds(2)
    same.rounds(2)
    assert sha256([("", run.server)]) == sha256([("", same.server)])
    with pytest.raises(ConfigError, match=r"fedit\.adapter: reft has no factors A and B"):
        start({"name": "fedit", "adapter": "reft"})
