"""A draw is a function of its key alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.randomness import keyed_rng, keyed_seed

KEYS = st.tuples(st.integers(0, 2**31), st.text(max_size=10), st.lists(st.integers(-5, 5) | st.text(max_size=5)))


def test_seeds_equal_the_hash_written_out_by_hand() -> None:
    """The first eight bytes of SHA-256 over the parts' reprs, separated by byte 1F, little-endian, without the top bit
    of 64, so halved. Written with literal bytes here: a change of the key's text would change every experiment."""
    for arguments, text in [
        ((0, "cohort", 3), b"0\x1f'cohort'\x1f3"),
        ((7, "order", 2, "client-1"), b"7\x1f'order'\x1f2\x1f'client-1'"),
        ((0, "split"), b"0\x1f'split'"),
    ]:
        digest = hashlib.sha256(text).digest()
        expected = sum(byte << (8 * place) for place, byte in enumerate(digest[:8])) // 2
        assert keyed_seed(*arguments) == expected


def test_pinned_values() -> None:
    """From `printf "0\\x1f'cohort'\\x1f3" | sha256sum` and the same for the others; equal on every machine."""
    assert keyed_seed(0, "cohort", 3) == 6025170895033158161
    assert keyed_seed(7, "order", 2, "client-1") == 8009504295980827471
    assert keyed_rng(0, "cohort", 3).integers(0, 1000, 5).tolist() == [727, 4, 371, 380, 349]


def test_a_draw_does_not_depend_on_earlier_draws() -> None:
    clients = [f"client-{index}" for index in range(6)]
    forwards = {client: keyed_rng(1, "order", 4, client).permutation(20).tolist() for client in clients}
    backwards = {client: keyed_rng(1, "order", 4, client).permutation(20).tolist() for client in reversed(clients)}
    assert forwards == backwards
    np.random.default_rng(0).normal(size=100)
    assert keyed_rng(1, "order", 4, clients[3]).permutation(20).tolist() == forwards[clients[3]]


@pytest.mark.parametrize(
    "other",
    [
        (1, "order", 2, "a"),
        (0, "dropout", 2, "a"),
        (0, "order", 3, "a"),
        (0, "order", 2, "b"),
        (0, "order", 2),
        (0, "order", "2", "a"),
        (0, "order", 2, "a", 0),
    ],
)
def test_every_part_of_the_key_matters(other: tuple[int, str, int | str]) -> None:
    key = (0, "order", 2, "a")
    assert keyed_seed(*key) != keyed_seed(*other)
    assert keyed_rng(*key).random(4).tolist() != keyed_rng(*other).random(4).tolist()


def test_neighbouring_keys_share_no_values() -> None:
    """Seeds that were sums (seed + round + client) would collide here: 3 x 10 x 10 keys, but only 21 sums."""
    seeds = {keyed_seed(seed, "order", t, k) for seed in range(3) for t in range(10) for k in range(10)}
    assert len(seeds) == 300


@given(KEYS, KEYS)
def test_seeds_fit_in_63_bits_and_are_equal_only_for_equal_keys(
    left: tuple[int, str, list[int | str]], right: tuple[int, str, list[int | str]]
) -> None:
    seeds = [keyed_seed(seed, purpose, *key) for seed, purpose, key in (left, right)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert (seeds[0] == seeds[1]) == (left == right)
