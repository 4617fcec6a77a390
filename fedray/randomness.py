"""Keyed randomness: every draw is keyed by (seed, purpose, ...), so none depends on earlier draws or on where it runs.

The key is hashed (SHA-256) rather than added to the seed, so that neighbouring rounds and clients share no stream.
"""

import hashlib

import numpy as np

Key = str | int


def keyed_seed(seed: int, purpose: str, *key: Key) -> int:
    """Return a 63-bit seed that is a pure function of its arguments."""
    text = "\x1f".join(repr(part) for part in (seed, purpose, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def keyed_rng(seed: int, purpose: str, *key: Key) -> np.random.Generator:
    """Return a numpy generator for the stream named by its arguments."""
    return np.random.default_rng(keyed_seed(seed, purpose, *key))
