"""FedHFT's outer level (arXiv 2510.14054): clients belong to clusters by shares π_k, which a Gaussian mixture fitted to
their latest updates gives them as posteriors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedray.aggregation.clustering import centre_gram, embed, fit_mixture, gram_of, match_components
from fedray.aggregation.low_rank import gram
from fedray.methods.parts.factors import Delta
from fedray.types import Client, ClientId, Vector

Memberships = Mapping[ClientId, Vector]
"""π_k [J] of every client."""

NEGLIGIBLE = 1e-6
"""A posterior below this counts as zero, so that a client receives nothing of that cluster."""


def refit(
    memberships: Memberships,
    features: Mapping[ClientId, Vector | Delta],
    seed: int,
    n_init: int = 5,
    choose: int | None = None,
) -> Memberships:
    """Return the memberships with π_k set to the posteriors of those clients that have features.

    Clusters keep their numbers as far as possible. With fewer than two clients nothing changes.

    Args:
        features: latest updates: vectors, or products B_k A_k.
        seed: of the fit.
        n_init: restarts of the fit.
        choose: choose the number of clusters by BIC, at most this one, all clients being in one so far; None: keep it.
    """
    ids = sorted(features)
    if len(ids) < 2:
        return memberships
    number = len(next(iter(memberships.values())))
    mixture = fit_mixture(
        embed(similarity([features[id] for id in ids])),
        number if choose is None else "auto",
        seed=seed,
        n_init=n_init,
        max_components=choose or number,
    )
    posteriors = np.where(mixture.posteriors < NEGLIGIBLE, 0, mixture.posteriors)
    posteriors /= posteriors.sum(axis=1, keepdims=True)
    if choose is not None:
        number = posteriors.shape[1]
        memberships = dict.fromkeys(memberships, np.full(number, 1 / number, np.float32))
    previous = np.stack([memberships[id] for id in ids]).astype(np.float64)
    matched = match_components(previous, posteriors).astype(np.float32)
    return {**memberships, **dict(zip(ids, matched, strict=True))}


class AdmitsClients:
    """A method whose server state has the field `memberships`."""

    def admit(self, server: Any, client: Client) -> Any:
        """Return the server with a client that arrives after the run: it belongs to all clusters alike, as all do at
        first."""
        number = len(next(iter(server.memberships.values())))
        alike = np.full(number, 1 / number, np.float32)
        return replace(server, memberships={**server.memberships, client.id: alike})


def similarity(features: Sequence[Vector | Delta]) -> npt.NDArray[np.float64]:
    """Return the centred Gram matrix of vectors, or of the products B_k A_k (never of raw factors). [K, K]"""
    vectors = [feature for feature in features if isinstance(feature, np.ndarray)]
    if len(vectors) == len(features):
        return centre_gram(gram_of(np.stack(vectors)))
    return centre_gram(gram([feature for feature in features if not isinstance(feature, np.ndarray)]))


def sizes(memberships: Memberships) -> dict[str, float]:
    """Return Σ_k π_kj of every cluster j, as metrics."""
    total = np.sum(list(memberships.values()), axis=0)
    return {f"cluster_{j}_size": float(size) for j, size in enumerate(total)}
