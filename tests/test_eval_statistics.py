"""Retrieval ranks, ties, and intervals: closed forms and properties."""

import numpy as np
import pytest

from shapeloom.eval.statistics import chance_scores, cluster_bootstrap, rank_scores, two_way, wilson


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_perfect_embeddings_score_one():
    x = unit(np.random.default_rng(0), 30, 8)
    ranks = rank_scores(x @ x.T, np.eye(30, dtype=bool))
    assert ranks.recall(1).tolist() == [1.0] * 30
    assert ranks.reciprocal().tolist() == [1.0] * 30


@pytest.mark.parametrize("n", [1, 7, 153])
def test_constant_embeddings_score_exactly_chance(n):
    ranks = rank_scores(np.full((n, n), 0.3), np.eye(n, dtype=bool))
    np.testing.assert_allclose(ranks.recall(1), 1 / n)
    np.testing.assert_allclose(ranks.recall(5), min(1, 5 / n))
    np.testing.assert_allclose(ranks.reciprocal(), np.mean(1 / np.arange(1, n + 1)))
    assert chance_scores(n)["mrr"] == pytest.approx(ranks.reciprocal()[0])


def test_a_tie_by_hand():
    ranks = rank_scores(np.array([[0.9, 0.5, 0.5, 0.1]]), np.array([[False, False, True, False]]))
    assert [ranks.recall(k)[0] for k in (1, 2, 3)] == [0.0, 0.5, 1.0]
    assert ranks.reciprocal()[0] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_float_noise_is_a_tie():
    assert rank_scores(np.array([[0.5, 0.5 + 1e-8]]), np.array([[True, False]])).recall(1)[0] == 0.5
    assert two_way(np.array([0.5]), np.array([0.5 + 1e-8]))[0] == 0.5


def test_equals_are_hits_and_never_distractors():
    hits = np.array([[True, True, False, False]])
    assert rank_scores(np.array([[0.2, 0.9, 0.5, 0.1]]), hits).recall(1)[0] == 1.0  # the best hit counts
    ranks = rank_scores(np.array([[0.5, 0.6, 0.9, 0.1]]), hits)
    assert ranks.recall(1)[0] == 0.0 and ranks.recall(2)[0] == 1.0  # the other hit does not push it down
    assert rank_scores(np.zeros((1, 4)), hits).recall(1)[0] == pytest.approx(chance_scores(4, 2)["r@1"])


def test_order_of_the_pool_does_not_matter():
    rng = np.random.default_rng(1)
    scores, hits = rng.normal(size=(40, 60)).round(1), np.zeros((40, 60), bool)
    hits[np.arange(40), rng.integers(0, 60, 40)] = True
    hits |= rng.random((40, 60)) < 0.02
    order = rng.permutation(60)
    a, b = rank_scores(scores, hits), rank_scores(scores[:, order], hits[:, order])
    np.testing.assert_array_equal(a.recall(5), b.recall(5))
    np.testing.assert_array_equal(a.reciprocal(), b.reciprocal())


def test_random_embeddings_are_near_chance():
    rng = np.random.default_rng(2)
    n = 2000
    ranks = rank_scores(unit(rng, n, 16) @ unit(rng, n, 16).T, np.eye(n, dtype=bool))
    chance, spread = 5 / n, np.sqrt(5 / n / n)
    assert abs(ranks.recall(5).mean() - chance) < 4 * spread


def test_broken_scores_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        rank_scores(np.array([[np.nan, 1.0]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="no right answer"):
        rank_scores(np.zeros((1, 2)), np.zeros((1, 2), bool))


def test_two_way():
    np.testing.assert_array_equal(two_way(np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])), [1.0, 0.0, 0.5])


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_bootstrap_agrees_with_wilson_for_one_binary_seed(share):
    n = 400
    values = (np.arange(n) < share * n).astype(float)[:, None, None]
    interval = cluster_bootstrap(values)[0]
    lo, hi = wilson(share, n)
    assert interval.mean == pytest.approx(share)
    assert interval.lo == pytest.approx(lo, abs=0.006) and interval.hi == pytest.approx(hi, abs=0.006)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_have_width(value):
    interval = cluster_bootstrap(np.full((153, 4, 1), value))[0]
    assert (interval.lo, interval.hi) == wilson(value, 153)
    assert interval.hi - interval.lo > 0.02


def test_equal_seeds_add_no_certainty_and_independent_ones_do():
    rng = np.random.default_rng(3)
    prompt = (rng.random((200, 1, 1)) < 0.5).astype(float)
    one, copies = cluster_bootstrap(prompt)[0], cluster_bootstrap(np.repeat(prompt, 4, 1))[0]
    width = one.hi - one.lo
    assert copies.hi - copies.lo == pytest.approx(width, rel=0.1)
    independent = cluster_bootstrap((rng.random((200, 4, 1)) < 0.5).astype(float))[0]
    assert independent.hi - independent.lo < 0.8 * width


def test_coverage_is_about_95_percent_with_correlated_seeds():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        rate = rng.beta(1, 1, size=(80, 1, 1))  # each prompt has its own difficulty; the mean is 1/2
        interval = cluster_bootstrap((rng.random((80, 3, 1)) < rate).astype(float), n_draws=500)[0]
        covered += interval.lo <= 0.5 <= interval.hi
    assert 180 <= covered <= 200  # the two-stage bootstrap errs on the wide side


def test_metrics_scored_together_equal_those_scored_alone():
    values = np.random.default_rng(5).random((50, 2, 3))
    together, alone = cluster_bootstrap(values)[1], cluster_bootstrap(values[..., 1:2])[0]
    assert (together.lo, together.hi) == pytest.approx((alone.lo, alone.hi), abs=1e-6)
    with pytest.raises(ValueError, match="no prompt"):
        cluster_bootstrap(np.zeros((0, 1, 1)))
