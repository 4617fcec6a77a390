"""A client that arrives after the run receives what it would have received as a client that was there from the start
and absent until now. Before the first round the two servers can be compared for every method."""

import numpy as np
import pytest
from every_method import entry, every_method
from tiny import TINY_LLAMA

from fedray.config import Config
from fedray.errors import ConfigError
from fedray.experiment.newcomer import _sent
from fedray.federation.tasks import downlinks_of
from fedray.methods.protocol import Initial, admitted
from fedray.models.architecture import architecture
from fedray.planning.costs import attached
from fedray.storage.state_tree import sha256
from fedray.types import Client

CLIENTS = [Client(f"client_{i:03d}", i, 5 + i) for i in range(4)]


@pytest.mark.parametrize("name", every_method())
def test_a_newcomer_receives_what_an_absent_client_would(name):
    config = Config.model_validate(
        {
            "rounds": 2,
            "method": [entry(name)],
            "model": {"path": "random", "tokenizer": "bytes", "config": {**TINY_LLAMA, "vocab_size": 32}},
            "data": {"source": "synthetic"},
        }
    )
    whole = attached(config, architecture(config.model, config.task, 3, None, None), config.method[0], None)
    method, rng = whole.method, np.random.default_rng(5)
    layouts = {group: whole.adapter.layout(group) for group in whole.adapter.names}
    values = {group: rng.normal(size=layout.size).astype(np.float32) for group, layout in layouts.items()}
    initial, late = Initial(3, layouts, values), CLIENTS[-1]

    def received(server):
        return downlinks_of(method.configure_train(server, [late]), [late])[late.id].payload

    grown = admitted(method, method.init_server(initial, CLIENTS[:-1]), late)
    from_the_start = method.init_server(initial, CLIENTS)
    assert sha256([("down", received(grown))]) == sha256([("down", received(from_the_start))])


def test_a_method_of_the_user_s_own_that_knows_no_newcomer_is_told_what_to_define():
    class Known:
        def configure_train(self, server, cohort):
            return {client.id: server[client.id] for client in cohort}

    with pytest.raises(ConfigError, match=r"define admit\(server, client\)"):
        _sent(Known(), {"client_000": 1}, CLIENTS[1])
