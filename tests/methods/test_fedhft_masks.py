"""Which rows a client of FedHFT keeps: one task by itself, without training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fedhft_parts import RANK, TARGETS, WIDTH, largest_rows

from fedray.adapters.adapter import Adapter
from fedray.config import LoraSection
from fedray.methods.fedhft import ClientState, ClusterMixture, FedHft
from fedray.methods.parts.factors import join, keep_rows, split, unpack_masks
from fedray.methods.parts.wire import encode
from fedray.randomness import keyed_rng
from fedray.types import Client, Evaluation

Run = Any


@dataclass
class FakeLocal:
    """A client's side of a round whose training puts given values into the adapter."""

    client: Client
    adapter: Adapter
    trained: Any
    fisher: Mapping[str, Any] | None = None
    server_round: int = 0
    seed: int = 3

    def train(self, **options: Any) -> None:
        assert not options
        self.adapter.load("lora", self.trained)

    def importance(self) -> Mapping[str, Any]:
        assert self.fisher is not None, "the Fisher information was asked for"
        return self.fisher

    def evaluate(self, split: Any) -> Evaluation:
        raise AssertionError("not needed")

    def rng(self, purpose: str) -> np.random.Generator:
        return keyed_rng(self.seed, purpose, self.server_round, self.client.id)

    def record(self, name: str, value: Any) -> None:
        pass


def train_once(
    run: Run, hyperparameters: Mapping[str, Any], ratio: float, fisher: Any = None
) -> tuple[Any, Any, ClientState]:
    """Return what a client with that ratio trained (split), its masks, and its state."""
    layout = run.initial.layouts["lora"]
    trained = np.random.default_rng(8).normal(size=layout.size).astype(np.float32)
    method = FedHft(lora=LoraSection(rank=RANK), **hyperparameters)
    local = FakeLocal(Client("ann", 0, 5, capacity={"mask_ratio": ratio}), run.adapter, trained, fisher)
    head = encode(run.initial.vectors["head"], "float32")
    payload, state = method.train_client(
        run.adapter, ClientState(None, None), ClusterMixture(None, head, np.ones(1, "f4")), local
    )
    masks = unpack_masks(layout, payload.masks)
    trained_deltas = split(layout, trained)
    assert np.array_equal(payload.factors, join(keep_rows(trained_deltas, masks)))
    return trained_deltas, masks, state


def test_post_keeps_the_rows_of_most_energy_or_fisher_information(fedhft: Callable[..., Run]) -> None:
    """⌈0.4·16⌉ = 7 rows, exactly; the two measures choose differently, and `fisher` is the default."""
    run = fedhft({})
    rng = np.random.default_rng(1)
    fisher = {target: rng.random(WIDTH) for target in TARGETS}
    trained, by_energy, state = train_once(run, {"importance": "energy"}, 0.4)
    _, by_fisher, _ = train_once(run, {"importance": "fisher"}, 0.4, fisher)
    _, by_default, _ = train_once(run, {}, 0.4, fisher)
    for target, delta, energetic, informative in zip(TARGETS, trained, by_energy, by_fisher, strict=True):
        assert energetic.sum() == informative.sum() == 7
        assert np.flatnonzero(energetic).tolist() == largest_rows((delta.dense() ** 2).sum(axis=1), 0.4)
        assert np.flatnonzero(informative).tolist() == largest_rows(fisher[target], 0.4)
        assert not np.array_equal(energetic, informative)
    assert np.array_equal(np.stack(by_fisher), np.stack(by_default))
    assert state.previous is None


def test_ties_go_to_the_lower_row(fedhft: Callable[..., Run]) -> None:
    """All rows equally important: the first ⌈0.4·16⌉ = 7."""
    _, masks, _ = train_once(fedhft({}), {}, 0.4, dict.fromkeys(TARGETS, np.ones(WIDTH)))
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [list(range(7))] * 4


def test_a_client_that_keeps_everything_measures_nothing(fedhft: Callable[..., Run]) -> None:
    """`FakeLocal` fails when asked for the Fisher information."""
    _, masks, _ = train_once(fedhft({}), {}, 1.0)
    assert np.stack(masks).all()
