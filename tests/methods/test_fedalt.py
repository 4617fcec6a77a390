"""FedALT against a straightforward loop of its own, and what its options mean.

The loop is written from the paper: its own layer, its own AdamW, its own means. From fedray it takes only what must be
equal for a comparison: the frozen backbone, first values, order of examples and dropout masks (by their keys).
"""

import numpy as np
import pytest
import torch
from received import received
from torch import nn

from fedray.adapters.dropout import dropout_mask
from fedray.adapters.kinds.lora import LoraKind
from fedray.config import LoraSection
from fedray.errors import ConfigError
from fedray.methods.fedalt import ClientState, FedAlt, Individual, RestOfWorld
from fedray.models.backbone import load_backbone
from fedray.randomness import keyed_rng, keyed_seed
from fedray.storage.state_tree import num_bytes


class PlainLayer(nn.Module):
    """y = W0 x + s α_L B A drop(x) + s α_R B_R A_R drop(x), (α_R, α_L) = softmax(G x)."""

    def __init__(self, base, name, rank, scale, dropout):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base, self.name, self.scale, self.dropout, self.key = base, name, scale, dropout, 0
        self.A, self.B = nn.Parameter(torch.zeros(rank, d_in)), nn.Parameter(torch.zeros(d_out, rank))
        self.G = nn.Parameter(torch.zeros(2, d_in))
        self.rest_A, self.rest_B = torch.zeros(rank, d_in), torch.zeros(d_out, rank)

    def forward(self, x):
        dropped = x * dropout_mask(self.key, self.name, x.shape, self.dropout, x.device) / (1 - self.dropout)
        rest, own = torch.exp(x @ self.G.T).unbind(-1)
        weight = (own / (own + rest)).unsqueeze(-1)
        return (
            self.base(x)
            + self.scale * weight * (dropped @ self.A.T @ self.B.T)
            + self.scale * (1 - weight) * (dropped @ self.rest_A.T @ self.rest_B.T)
        )


class PlainClient:
    """One client's tensors and its training in the plain loop; all clients share the model and its layers."""

    def __init__(self, run, client, model, layers):
        self.id, self.table = client.id, run.prepared.data.shards[client.id].tables["train"]
        self.config, self.pad, self.model, self.layers = run.config, run.prepared.data.pad_token_id, model, layers
        first = run.method.init_client(run.initial, client)
        self.lora = {name: torch.tensor(view) for name, view in run.views("lora", first.lora).items()}
        self.mixer = {name: torch.tensor(view) for name, view in run.views("mixer", first.mixer).items()}

    def train(self, server_round, rest, head):
        """Start from one's own L and G, the rest as it came (zero in round 0) and the head; return the trained head."""
        parameters = {f"{path}.{part}": getattr(layer, part) for path, layer in self.layers for part in "ABG"}
        parameters |= dict(self.model.classifier.named_parameters(prefix="classifier"))
        with torch.no_grad():
            for name, value in (self.lora | self.mixer | head).items():
                parameters[name].copy_(value)
        for path, layer in self.layers:
            layer.rest_A, layer.rest_B = rest[f"{path}.A"], rest[f"{path}.B"]
        self._adamw(server_round, list(parameters.values()))
        trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.lora = {name: trained[name] for name in self.lora}
        self.mixer = {name: trained[name] for name in self.mixer}
        return {name: trained[name] for name in head}

    def _adamw(self, server_round, parameters):
        """AdamW from nothing: linear decay to 0, gradients clipped to norm 1, decoupled weight decay."""
        train = self.config.train
        (b1, b2), batches = train.betas, list(self._batches(server_round))
        first, second = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
        for step, (tokens, mask, labels) in enumerate(batches):
            for _, layer in self.layers:
                layer.key = keyed_seed(self.config.seed, "dropout", server_round, self.id, step, 0)
            log_p = torch.log_softmax(self.model(input_ids=tokens, attention_mask=mask).logits, -1)
            loss = -log_p[torch.arange(len(labels)), labels].mean()
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))
            gradients = [g / max(1.0, float(norm) / train.clip) for g in gradients]
            lr = train.lr * (1 - step / len(batches))
            with torch.no_grad():
                for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                    m.copy_(b1 * m + (1 - b1) * g)
                    v.copy_(b2 * v + (1 - b2) * g**2)
                    m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                    p.sub_(lr * train.weight_decay * p + lr * m_hat / (v_hat.sqrt() + train.eps))

    def _batches(self, server_round):
        rows, size = self.table.to_pylist(), self.config.train.batch_size
        for epoch in range(int(self.config.train.epochs)):
            order = keyed_rng(self.config.seed, "order", server_round, self.id, epoch).permutation(len(rows))
            for start in range(0, len(rows), size):
                texts = [rows[i]["input_ids"] for i in order[start : start + size]]
                width = max(map(len, texts))
                tokens = torch.tensor([text + [self.pad] * (width - len(text)) for text in texts])
                mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
                yield tokens, mask, torch.tensor([rows[i]["labels"] for i in order[start : start + size]])


def plain_federation(run, rounds):
    """FedALT as a loop over rounds and clients; returns the clients and the head."""
    config, lora = run.config, run.config.lora
    model = load_backbone(
        config.model, run.prepared.architecture, config.task, config.seed, "cpu", config.data.cache_dir
    )
    layers = []
    for index, block in enumerate(model.bert.encoder.layer):
        for name in ("query", "value"):
            path = f"bert.encoder.layer.{index}.attention.self.{name}"
            base = getattr(block.attention.self, name)
            layers.append((path, PlainLayer(base, path, lora.rank, lora.alpha / lora.rank, lora.dropout)))
            setattr(block.attention.self, name, layers[-1][1])
    model.classifier.requires_grad_(True)
    clients = [PlainClient(run, client, model, layers) for client in run.prepared.clients]
    head = {name: torch.tensor(view) for name, view in run.views("head", run.initial.vectors["head"]).items()}
    head = {name.removesuffix(".tensor"): value for name, value in head.items()}
    trained = {}
    for server_round in range(rounds):
        heads = {}
        sent = dict(trained)
        for client in clients:
            others = [sent[id] for id in sent if id != client.id]
            rest = {
                name: sum(other[name] for other in others) / len(others) if others else torch.zeros_like(value)
                for name, value in client.lora.items()
            }
            heads[client.id] = client.train(server_round, rest, head)
            trained[client.id] = client.lora
        total = sum(client.table.num_rows for client in clients)
        head = {name: sum(heads[c.id][name] * (c.table.num_rows / total) for c in clients) for name in head}
    return clients, head


def test_against_a_straightforward_loop(start):
    """Three rounds, three clients of 9, 5 and 7 examples (3, 2 and 2 steps per epoch), two epochs, dropout 0.1,
    linear decay, clipping at 1, weight decay 0.05: all states within 1e-5."""
    run = start("fedalt", train__epochs=2, train__lr=0.003)
    run.rounds(3)
    clients, head = plain_federation(run, 3)
    for client in clients:
        state = run.state(client.id)
        for name, view in (run.views("lora", state.lora) | run.views("mixer", state.mixer)).items():
            np.testing.assert_allclose(view, (client.lora | client.mixer)[name], atol=1e-5, rtol=0, err_msg=name)
    for name, view in run.views("head", run.federation.server.head).items():
        np.testing.assert_allclose(view, head[name.removesuffix(".tensor")], atol=1e-5, rtol=0, err_msg=name)
    first = run.method.init_client(run.initial, run.prepared.clients[0])
    assert np.abs(run.state("client_000").mixer - first.mixer).max() > 1e-3  # this compares no standstills


def test_the_rest_is_frozen_during_training(start):
    """Round 0 trains with R = 0, the next one with what came; training leaves it as it is, bit for bit."""
    run = start("fedalt")
    for server_round in range(2):
        downlinks = received(run.method, run.federation.server, run.prepared.clients)
        for id, result in run.serve("client_000", "client_001", "client_002").items():
            rest = downlinks[id].rest
            assert (rest is None) == (server_round == 0)
            expected = np.zeros(run.initial.layouts["rest"].size) if rest is None else rest
            held = [result.adapter[f"rest.{slot.name}"].reshape(-1) for slot in run.initial.layouts["rest"].slots]
            assert np.array_equal(np.concatenate(held), expected)
        run.round()


def test_one_client_alone_keeps_a_rest_of_zero(start):
    run = start("fedalt", clients__count=1, data__groups=1)
    run.rounds(2)
    (result,) = run.serve("client_000").values()
    assert all(not view.any() for name, view in result.adapter.items() if name.startswith("rest."))
    assert result.downlink_bytes == 4 * run.initial.layouts["head"].size


@pytest.fixture
def method(request):
    """FedALT of the options given by `parametrize("method", [...], indirect=True)`."""
    return FedAlt(adapter=LoraKind(lora=LoraSection(rank=2, alpha=8.0)), **getattr(request, "param", {}))


def individuals(vectors, head=None):
    return [Individual(vector, head) for vector in vectors]


def test_training_starts_from_ones_own_lora_and_mixer(method, paper, clients, vector_adapter, fake_local, spread):
    """Every group holds what belongs there when training begins; training that changes nothing sends back the
    individual LoRA that was there before, whatever the rest of the world is."""
    (lora, rest), (mixer,) = spread(2, 28), spread(1, 16)
    head, adapter, seen = spread(1, 3)[0], vector_adapter(paper), {}
    local = fake_local(clients[0], adapter, training=lambda a: seen.update({name: a.read(name) for name in a.names}))
    sent, own = method.train_client(adapter, ClientState(lora, mixer, None), RestOfWorld(rest, head), local)
    for name, expected in {"lora": lora, "rest": rest, "mixer": mixer, "head": head}.items():
        assert np.array_equal(seen[name], expected)
    assert np.array_equal(sent.lora, lora)
    assert np.array_equal(own.lora, lora)
    assert np.array_equal(own.mixer, mixer)


def test_without_others_the_rest_is_zero_even_if_another_client_left_one(
    method, paper, clients, vector_adapter, fake_local, spread
):
    adapter = vector_adapter(paper)
    adapter.load("rest", spread(1, 28)[0])
    own = method.init_client(paper, clients[0])
    method.train_client(adapter, own, RestOfWorld(None, paper.head()), fake_local(clients[0], adapter))
    assert not adapter.read("rest").any()


def test_rest_of_world_counts_latest_updates_and_nobody_who_never_trained(method, paper, clients, spread, updates):
    """a, b and c train in round 0, a alone in round 1; d and e never. Then

    R_a = (b0 + c0)/2,   R_b = (a1 + c0)/2,   R_d = (a1 + b0 + c0)/3: unweighted, though the clients differ in size.
    """
    a0, b0, c0, a1 = spread(4, 28)
    server = method.init_server(paper, clients)
    assert all(down.rest is None for down in received(method, server, clients).values())
    server, _ = method.aggregate_train(server, updates(clients[:3], individuals([a0, b0, c0])))
    server, _ = method.aggregate_train(server, updates(clients[:1], individuals([a1])))
    down = received(method, server, clients)
    for id, others in {"a": [b0, c0], "b": [a1, c0], "c": [a1, b0], "d": [a1, b0, c0], "e": [a1, b0, c0]}.items():
        np.testing.assert_allclose(down[id].rest, sum(others) / len(others), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"rest": "mean"}, (0 + 1 + 2 + 97) / 4),
        ({"rest": "trimmed_mean", "trim": 0.25}, (1 + 2) / 2),
        ({"rest": "trimmed_mean", "trim": 0.0}, 25),
    ],
    indirect=["method"],
)
def test_rest_variants(method, paper, clients, updates, expected):
    """The others of e hold 0, 1, 2 and 97 in every coordinate; a quarter off each end leaves 1 and 2."""
    vectors = [np.full(28, value, np.float32) for value in (0, 1, 2, 97, 5)]
    server, _ = method.aggregate_train(method.init_server(paper, clients), updates(clients, individuals(vectors)))
    np.testing.assert_allclose(received(method, server, clients)["e"].rest, expected)


@pytest.mark.parametrize("method", [{"rest": "geometric_median"}], indirect=True)
def test_the_geometric_median_of_a_cross_is_its_crossing(method, paper, clients, updates):
    """Points of a convex quadrilateral have the crossing of its diagonals as geometric median (0 here), while their
    mean is (9 − 1)/4 = 2 in the first coordinate and (3 − 1)/4 = 1/2 in the second."""
    vectors = np.zeros((5, 28), np.float32)
    vectors[:4, :2] = [[9, 0], [-1, 0], [0, 3], [0, -1]]
    server, _ = method.aggregate_train(method.init_server(paper, clients), updates(clients, individuals(vectors)))
    np.testing.assert_allclose(received(method, server, clients)["e"].rest, 0, atol=1e-5)


@pytest.mark.parametrize(
    "mixer",
    [{"mixer": "adaptive"}, {"mixer": "fixed", "alpha": 0.3}, {"mixer": "fixed", "alpha": 1.0}, {"mixer": "none"}],
)
def test_what_a_layer_computes(start, spread, mixer):
    """y = W0 x + s (w_L B A x + w_R B_R A_R x): fixed α has weights α and 1 − α, none has 1 and 1, adaptive the
    softmax of G x with R in row 0. s = 8 / 2."""
    run = start({"name": "fedalt", **mixer})
    adapter = run.worker.adapter
    names = [name for name in adapter.names if name != "head"]
    vectors = {name: spread(k + 1, adapter.layout(name).size)[k] for k, name in enumerate(names)}  # no two alike
    assert ("mixer" in vectors) == (mixer["mixer"] == "adaptive")
    for name, vector in vectors.items():
        adapter.load(name, vector)
    path, layer = next(iter(adapter.targets.items()))
    own, rest = (adapter.layout(name).views(vectors[name]) for name in ("lora", "rest"))
    x = spread(6, 16)
    w_own = w_rest = np.ones((6, 1))
    if mixer["mixer"] == "fixed":
        w_own, w_rest = mixer["alpha"] * w_own, (1 - mixer["alpha"]) * w_rest
    if mixer["mixer"] == "adaptive":
        logits = np.exp(x @ adapter.layout("mixer").views(vectors["mixer"])[f"{path}.G"].T)
        w_rest, w_own = np.split(logits / logits.sum(1, keepdims=True), 2, axis=1)
    base = layer.get_base_layer()
    expected = x @ base.weight.numpy().T + base.bias.numpy()
    expected = expected + 4 * w_own * (x @ own[f"{path}.A"].T @ own[f"{path}.B"].T)
    expected = expected + 4 * w_rest * (x @ rest[f"{path}.A"].T @ rest[f"{path}.B"].T)
    with torch.no_grad():
        found = layer(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_only_the_individual_lora_and_the_head_travel(start):
    """Per client and round up A, B and the head, down A_R, B_R and the head (round 0: the head alone); never G.

    Four targets of 2 · (16 + 16) numbers, a head of 3 · 16 + 3; a mixer would be four times 2 · 16.
    """
    run = start("fedalt")
    lora, head = 4 * 2 * (16 + 16), 3 * 16 + 3
    assert run.initial.layouts["mixer"].size == 4 * 2 * 16
    for server_round in range(2):
        for result in run.round().results:
            assert set(vars(result.payload)) == {"lora", "head", "rows"}
            assert result.payload.rows is None
            assert (result.payload.lora.size, result.payload.head.size) == (lora, head)
            assert result.uplink_bytes == 4 * (lora + head)
            assert result.downlink_bytes == 4 * (head if server_round == 0 else lora + head)
    assert num_bytes(run.federation.server) == 4 * (3 * lora + head)


@pytest.mark.parametrize("method", [{"mixer": "none"}, {"mixer": "fixed"}], indirect=True)
def test_without_a_trained_mixer_there_is_none_to_keep(method, paper, clients, vector_adapter, fake_local):
    del paper.vectors["mixer"], paper.layouts["mixer"]
    adapter, own = vector_adapter(paper), method.init_client(paper, clients[0])
    _, after = method.train_client(adapter, own, RestOfWorld(None, paper.head()), fake_local(clients[0], adapter))
    assert own.mixer is after.mixer is None


def test_mixers_differ_between_clients_and_train(start):
    run = start("fedalt")
    first = {client.id: run.method.init_client(run.initial, client).mixer for client in run.prepared.clients}
    run.rounds(2)
    for id, mixer in first.items():
        assert not np.array_equal(run.state(id).mixer, mixer)


@pytest.mark.parametrize("a_init", ["independent", "common"])
def test_first_values(paper, clients, a_init):
    """independent: every client its own A and G, the same each time it is asked; common: one draw. B is zero."""
    paper.vectors["lora"][:] = np.where(paper.layouts["lora"].mask({"B"}), 0, paper.vectors["lora"])
    method = FedAlt(adapter=LoraKind(lora=LoraSection(rank=2)), a_init=a_init)
    own = [method.init_client(paper, client) for client in clients]
    is_b = paper.layouts["lora"].mask({"B"})
    for group in ("lora", "mixer"):
        vectors = [getattr(state, group) for state in own]
        distinct = len({vector.tobytes() for vector in vectors})
        assert distinct == (len(clients) if a_init == "independent" else 1)
        assert np.array_equal(vectors[1], getattr(method.init_client(paper, clients[1]), group))
    assert all(not state.lora[is_b].any() for state in own)
    if a_init == "independent":
        assert all(0 < np.abs(state.lora).max() <= 1 / 2 for state in own)  # 1/√d_in with d_in = 4


@pytest.mark.parametrize("method", [{"head": "shared"}], indirect=True)
def test_a_shared_head_is_the_mean_weighted_by_examples(method, paper, clients, spread, updates):
    """b has 2 examples and d 4: (2 h_b + 4 h_d)/6. Clients that are absent do not count, unlike for the rest."""
    heads, loras = spread(5, 3), spread(5, 28)
    server = method.init_server(paper, clients)
    assert np.array_equal(server.head, paper.head())
    every = [Individual(lora, head) for lora, head in zip(loras, heads, strict=True)]
    server, _ = method.aggregate_train(server, updates(clients, every))
    server, _ = method.aggregate_train(server, updates([clients[1], clients[3]], [every[1], every[3]]))
    np.testing.assert_allclose(server.head, (2 * heads[1] + 4 * heads[3]) / 6, atol=1e-6)
    assert all(down.head is server.head for down in received(method, server, clients).values())


def test_a_local_head_stays_with_its_client(start):
    run = start("fedalt", head="local")
    done = run.rounds(2)[-1]
    assert run.federation.server.head is None
    assert all(result.payload.head is None for result in done.results)
    assert all(result.downlink_bytes == 4 * run.initial.layouts["rest"].size for result in done.results)
    trained = {run.state(client.id).head.tobytes() for client in run.prepared.clients}
    assert len(trained | {run.initial.head().tobytes()}) == 4


def test_a_frozen_head_never_moves_and_never_travels(start):
    run = start("fedalt", head="frozen_label_text")
    adapter = run.worker.adapter
    for done in run.rounds(2):
        assert all(result.payload.head is None for result in done.results)
        assert np.array_equal(adapter.read("head"), run.initial.head())
    assert run.initial.head().any()
    assert run.federation.server.head is run.state("client_000").head is None
    assert all(result.downlink_bytes == 4 * run.initial.layouts["rest"].size for result in done.results)


@pytest.mark.parametrize(
    ("options", "complaint"), [({"alpha": 1.5}, "alpha.*1.5"), ({"alpha": -0.1}, "alpha"), ({"trim": 0.5}, "trim.*0.5")]
)
def test_values_out_of_range_are_refused(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        FedAlt(adapter=LoraKind(lora=LoraSection()), **options)
