import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from fedray.aggregation.clustering import centre_gram, embed, fit_mixture, gram_of, match_components
from fedray.aggregation.low_rank import LowRank, gram

deterministic = settings(deadline=None, derandomize=True, max_examples=30)
seeds = st.integers(0, 10**6)


def planted(seed, sizes, d, separation):
    """Groups of the given sizes; centres `separation` apart from each other, noise of length 1 in d dimensions."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(d, len(sizes))))[0].T * separation / np.sqrt(2)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return (centres[labels] + rng.normal(size=(len(labels), d)) / np.sqrt(d)).astype(np.float32), labels


def agreement(mixture, labels):
    return adjusted_rand_score(labels, mixture.posteriors.argmax(axis=1))


@deterministic
@given(seeds, st.integers(1, 9))
def test_centring_the_gram_matrix_is_centring_the_points(seed, K):
    points = np.random.default_rng(seed).normal(size=(K, 6))
    centred = points - points.mean(axis=0)
    np.testing.assert_allclose(centre_gram(points @ points.T), centred @ centred.T, atol=1e-12)


def test_close_points_far_from_the_origin_keep_their_distances():
    """Clients 1e-3 apart around values near 10: distances from the centred Gram matrix are within 1e-6 of direct ones,
    those from a raw float32 Gram matrix are not within 10 %."""
    points = (10 + 1e-3 * np.random.default_rng(0).normal(size=(6, 5000))).astype(np.float32)
    direct = np.linalg.norm(points[0].astype(np.float64) - points[1])

    def distance(gram):
        return np.sqrt(max(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1], 0))

    assert distance(gram_of(points)) == pytest.approx(direct, rel=1e-6)
    assert distance(gram_of(points, block=77)) == pytest.approx(direct, rel=1e-6)
    assert abs(distance((points @ points.T).astype(np.float64)) - direct) > 0.1 * direct


def test_products_are_summed_in_float64():
    points = np.random.default_rng(0).normal(size=(5, 3000)).astype(np.float32)
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(gram_of(points), centred @ centred.T, rtol=1e-12)


@deterministic
@given(seeds, st.integers(2, 12))
def test_the_embedding_keeps_all_distances(seed, K):
    points = np.random.default_rng(seed).normal(size=(K, 30)).astype(np.float32)
    embedding = embed(gram_of(points))
    assert embedding.shape == (K, K - 1)
    np.testing.assert_allclose(embedding @ embedding.T, gram_of(points), atol=1e-9)
    variances = embedding.var(axis=0)
    assert (np.diff(variances) <= 1e-12).all()
    assert (embedding[np.abs(embedding).argmax(axis=0), range(K - 1)] > 0).all()


def test_the_embedding_has_no_more_components_than_asked_or_real():
    rng = np.random.default_rng(0)
    on_a_plane = (rng.normal(size=(20, 2)) @ rng.normal(size=(2, 50))).astype(np.float64)
    assert embed(centre_gram(on_a_plane @ on_a_plane.T)).shape == (20, 2)
    assert embed(gram_of(rng.normal(size=(40, 90)).astype(np.float32))).shape == (40, 16)
    assert embed(gram_of(rng.normal(size=(40, 90)).astype(np.float32)), max_components=5).shape == (40, 5)


@pytest.mark.parametrize(
    ("sizes", "separation"), [((4, 4, 4), 1.2), ((4, 4, 4), 20), ((2, 5, 5), 2), ((3, 3), 2), ((10, 25, 15), 1.2)]
)
def test_planted_groups_are_found_under_high_dimensional_noise(sizes, separation):
    """In 20,000 dimensions two members of a group lie √2 noise lengths apart, about as far as the groups' centres."""
    for seed in range(3):
        points, labels = planted(seed, sizes, 20_000, separation)
        mixture = fit_mixture(embed(gram_of(points)), len(sizes), seed=seed)
        assert mixture.posteriors.shape == (len(labels), len(sizes))
        np.testing.assert_allclose(mixture.posteriors.sum(axis=1), 1, atol=1e-9)
        assert agreement(mixture, labels) == 1


@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 6), (12, 20, 8, 10)])
def test_auto_finds_the_number_of_groups(sizes):
    points, labels = planted(1, sizes, 5000, 2)
    mixture = fit_mixture(embed(gram_of(points)), "auto", seed=1)
    assert mixture.num_components == len(sizes)
    assert agreement(mixture, labels) == 1


def test_auto_finds_no_groups_where_there_are_none():
    points, _ = planted(2, (40,), 5000, 0)
    mixture = fit_mixture(embed(gram_of(points)), "auto", seed=2)
    assert mixture.num_components == 1
    assert mixture.posteriors.tolist() == [[1.0]] * 40


def test_auto_takes_one_elongated_group_for_one():
    """Standard deviations 1, 1/2, 1/4, ...: reading more of the narrow coordinates must not count as a better fit."""
    embedding = np.random.default_rng(0).normal(size=(60, 8)) * 0.5 ** np.arange(8)
    assert fit_mixture(embedding - embedding.mean(axis=0), "auto", seed=0).num_components == 1


@pytest.mark.parametrize("K", [1, 2, 5, 9])
def test_auto_makes_no_groups_of_fewer_than_three_on_average(K):
    for seed in range(4):
        points, _ = planted(seed, (K,), 5000, 0)
        assert fit_mixture(embed(gram_of(points)), "auto", seed=seed).num_components <= max(1, K // 3)


def test_auto_prefers_the_lower_bic():
    embedding = embed(gram_of(planted(3, (10, 10), 500, 3)[0]))
    chosen = fit_mixture(embedding, "auto", seed=3, max_components=2)
    one, two = fit_mixture(embedding, 1, seed=3), fit_mixture(embedding, 2, seed=3)
    assert chosen.num_components == 2
    assert two.bic < one.bic
    assert chosen.bic == two.bic


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_groups_do_not_depend_on_the_unit_of_the_updates(scale):
    points, _ = planted(4, (5, 5, 5), 300, 1.5)
    embedding = embed(gram_of(points))
    reference, scaled = (fit_mixture(e, 3, seed=4) for e in (embedding, scale * embedding))
    np.testing.assert_allclose(scaled.posteriors, reference.posteriors, atol=1e-9)


def test_equal_seeds_give_equal_bits_and_the_seed_may_have_63_bits():
    embedding = embed(gram_of(planted(5, (5, 7), 100, 0.5)[0]))
    first, second = (fit_mixture(embedding, 3, seed=2**63 - 1) for _ in range(2))
    assert np.array_equal(first.posteriors, second.posteriors)


@pytest.mark.parametrize("K", [1, 2, 7])
def test_identical_clients_belong_everywhere_equally(K):
    points = np.tile(np.random.default_rng(0).normal(size=50).astype(np.float32), (K, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedding = embed(gram_of(points))
        fixed, auto = fit_mixture(embedding, 3, seed=0), fit_mixture(embedding, "auto", seed=0)
    assert embedding.shape == (K, 0)
    assert fixed.posteriors.tolist() == [[1 / 3] * 3] * K
    assert auto.posteriors.tolist() == [[1.0]] * K
    assert fixed.bic == auto.bic == float("-inf")


def test_identical_low_rank_updates_are_seen_as_identical():
    """Their Gram entries differ in the last digits, which centring must not mistake for groups."""
    rng = np.random.default_rng(0)
    x = LowRank(rng.normal(size=(90, 16)).astype(np.float32), rng.normal(size=(16, 70)).astype(np.float32))
    assert embed(centre_gram(gram([[x]] * 7))).shape == (7, 0)
    turned = LowRank(x.B[:, ::-1] * np.float32(2), x.A[::-1] * np.float32(0.5))
    assert embed(centre_gram(gram([[x], [turned], [x], [turned]]))).shape == (4, 0)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_fewer_clients_than_components(K):
    points = np.random.default_rng(0).normal(size=(K, 10)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture = fit_mixture(embed(gram_of(points)), 6, seed=0)
    assert mixture.posteriors.shape == (K, 6)
    np.testing.assert_allclose(mixture.posteriors.sum(axis=1), 1, atol=1e-9)
    np.testing.assert_array_equal(mixture.posteriors[:, K:], 0)


def test_fewer_distinct_clients_than_components():
    points = np.repeat(np.random.default_rng(0).normal(size=(2, 10)), [4, 5], axis=0).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture = fit_mixture(embed(gram_of(points)), 4, seed=0)
    assert agreement(mixture, np.repeat([0, 1], [4, 5])) == 1
    np.testing.assert_array_equal(mixture.posteriors[:, 2:], 0)


@pytest.mark.parametrize("bad", [{"num_components": 0}, {"n_init": 0}, {"num_components": "auto", "max_components": 0}])
def test_impossible_mixtures_are_refused(bad):
    with pytest.raises(ValueError, match="n_init and clients >= 1"):
        fit_mixture(np.ones((3, 1)), **{"num_components": 2, "seed": 0, **bad})


@deterministic
@given(seeds, st.integers(1, 5))
def test_a_permutation_of_the_columns_is_undone(seed, J):
    rng = np.random.default_rng(seed)
    previous = rng.dirichlet(np.full(J, 0.2), size=12)
    previous[np.arange(J), :] = np.eye(J)
    order = rng.permutation(J)
    assert np.array_equal(match_components(previous, previous[:, order]), previous)


def test_matching_is_best_overall_not_column_by_column():
    """Overlaps previousᵀ current are [[5, 4], [4, 0]]: greedy would pair (0, 0) for 5 + 0, the best total is 4 + 4."""
    previous = np.repeat(np.eye(2), [9, 4], axis=0)
    current = np.zeros((13, 2))
    current[:5, 0] = current[5:9, 1] = current[9:, 0] = 1
    assert np.array_equal(match_components(previous, current), current[:, ::-1])


def test_matching_when_the_number_of_clusters_changes():
    """Three groups of two: a cluster that is gone keeps an empty column, a new one comes last."""
    three = np.repeat(np.eye(3), 2, axis=0)
    merged = np.array([[0.0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0]])
    shrunk = match_components(three, merged)
    assert shrunk.shape == (6, 3)
    assert shrunk[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert sorted(shrunk.sum(axis=0).tolist()) == [0, 2, 4]
    two = np.array([[1.0, 0]] * 2 + [[0, 1.0]] * 2 + [[0.4, 0.6]] * 2)
    grown = match_components(two, three[:, [2, 0, 1]])
    assert np.array_equal(grown, three)


def test_matching_needs_the_same_clients():
    with pytest.raises(ValueError, match="same clients"):
        match_components(np.ones((3, 1)), np.ones((4, 1)))


def test_components_are_numbered_by_their_first_clients():
    """Whatever the start: the group of client 0 is component 0, the first client that is not in it has component 1."""
    points, groups = planted(4, (5, 5, 5), 300, 1.5)
    order = np.random.default_rng(1).permutation(len(groups))
    seen = list(dict.fromkeys(np.asarray(groups)[order].tolist()))
    for seed in range(5):
        found = fit_mixture(embed(gram_of(points[order])), 3, seed=seed).posteriors.argmax(axis=1)
        assert found.tolist() == [seen.index(group) for group in np.asarray(groups)[order].tolist()]
