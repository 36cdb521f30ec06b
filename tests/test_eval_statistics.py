"""Retrieval ranks, ties, intervals and comparisons: closed forms, SciPy, simulation and properties."""

import itertools

import numpy as np
import pytest
from scipy import stats

from shapeloom.eval.benchmark.statistics import (
    chance_scores,
    cluster_bootstrap,
    holm,
    margins,
    mcnemar,
    paired_bootstrap,
    rank_scores,
    two_way,
    variance_parts,
    wilson,
)


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def drawn(rng, mean, spread, n_prompts, n_seeds, n_runs):
    """Binary outcomes [P, S, runs] of prompts whose beta-distributed difficulty makes `spread` of the variance."""
    shape = (n_prompts, 1, n_runs)
    k = 1 / spread - 1 if spread else 0
    rate = rng.beta(mean * k, (1 - mean) * k, size=shape) if spread else np.full(shape, mean)
    return (rng.random((n_prompts, n_seeds, n_runs)) < rate).astype(np.float64)


# --- retrieval -------------------------------------------------------------------------------------------------------


def all_scores(ranks):
    return np.stack([ranks.recall(1), ranks.recall(5), ranks.recall(10), ranks.reciprocal()])


def test_perfect_embeddings_score_exactly_one():
    x = unit(np.random.default_rng(0), 30, 8)
    assert (all_scores(rank_scores(x @ x.T, np.eye(30, dtype=bool))) == 1.0).all()


@pytest.mark.parametrize("n", [1, 7, 153])
def test_constant_embeddings_score_exactly_chance(n):
    ranks, chance = rank_scores(np.full((n, n), 0.3), np.eye(n, dtype=bool)), chance_scores(n)
    assert (ranks.recall(1) == 1 / n).all()
    assert list(chance) == ["r@1", "r@5", "r@10", "mrr"]
    for k in (1, 5, 10):
        np.testing.assert_allclose(ranks.recall(k), min(1, k / n))
        assert chance[f"r@{k}"] == ranks.recall(k)[0]
    np.testing.assert_allclose(ranks.reciprocal(), np.mean(1 / np.arange(1, n + 1)))
    np.testing.assert_allclose(ranks.expected(), (n + 1) / 2)
    assert chance["mrr"] == ranks.reciprocal()[0]


def test_random_embeddings_have_chance_within_their_intervals():
    rng = np.random.default_rng(2)
    n = 1000
    ranks = rank_scores(unit(rng, n, 16) @ unit(rng, n, 16).T, np.eye(n, dtype=bool))
    intervals = cluster_bootstrap(all_scores(ranks).T[:, None])
    for interval, chance in zip(intervals, chance_scores(n).values()):
        assert interval.lo < chance < interval.hi < 0.05


def test_a_tie_by_hand():
    ranks = rank_scores(np.array([[0.9, 0.5, 0.5, 0.1]]), np.array([[False, False, True, False]]))
    assert [ranks.recall(k)[0] for k in (1, 2, 3)] == [0.0, 0.5, 1.0]
    assert ranks.reciprocal()[0] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert ranks.expected()[0] == 2.5


def test_expected_credit_is_the_mean_over_the_orders_of_a_tie():
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    ranks = rank_scores(scores[None], np.array([[False, False, True, False, False]]))
    places = [1 + sorted(order, key=lambda item: -scores[item]).index(2) for order in itertools.permutations(range(5))]
    for k in range(1, 6):
        assert ranks.recall(k)[0] == pytest.approx(np.mean([place <= k for place in places]))
    assert ranks.reciprocal()[0] == pytest.approx(np.mean([1 / place for place in places]))
    assert ranks.expected()[0] == pytest.approx(np.mean(places))


@pytest.mark.parametrize("score", [0.5, 0.1234565, -0.0000005])  # two lie where a decimal is rounded
def test_float_noise_is_a_tie(score):
    noise = np.array([[score, score + 1e-8], [score, score - 1e-8]], np.float64)
    hits = np.array([[True, False], [True, False]])
    assert rank_scores(noise, hits).recall(1).tolist() == [0.5, 0.5]
    assert two_way(noise[:, 0], noise[:, 1]).tolist() == [0.5, 0.5]


def test_equals_are_hits_and_never_distractors():
    hits = np.array([[True, True, False, False]])
    assert rank_scores(np.array([[0.2, 0.9, 0.5, 0.1]]), hits).recall(1)[0] == 1.0  # the best hit counts
    ranks = rank_scores(np.array([[0.5, 0.6, 0.9, 0.1]]), hits)
    assert ranks.recall(1)[0] == 0.0 and ranks.recall(2)[0] == 1.0  # the other hit does not push it down
    assert rank_scores(np.zeros((1, 4)), hits).recall(1)[0] == pytest.approx(chance_scores(4, 2)["r@1"])


def some_scores():
    rng = np.random.default_rng(1)
    scores, hits = rng.normal(size=(40, 60)).round(1), np.zeros((40, 60), bool)
    hits[np.arange(40), rng.integers(0, 60, 40)] = True
    return scores, hits | (rng.random((40, 60)) < 0.02)


def test_order_of_gallery_and_prompts_does_not_matter():
    scores, hits = some_scores()
    expected, margin = all_scores(rank_scores(scores, hits)), margins(scores, hits)
    gallery, prompts = np.random.default_rng(2).permutation(60), np.random.default_rng(3).permutation(40)
    np.testing.assert_array_equal(all_scores(rank_scores(scores[:, gallery], hits[:, gallery])), expected)
    np.testing.assert_array_equal(all_scores(rank_scores(scores[prompts], hits[prompts])), expected[:, prompts])
    np.testing.assert_array_equal(margins(scores[:, gallery], hits[:, gallery]), margin)


def test_margins():
    scores, hits = np.array([[0.9, 0.2, 0.5], [0.1, 0.2, 0.5]]), np.array([[True, True, False], [True, False, False]])
    assert margins(scores, hits) == pytest.approx([0.4, -0.4])
    scores, hits = some_scores()
    np.testing.assert_array_equal(margins(scores, hits) > 1e-6, rank_scores(scores, hits).recall(1) == 1)
    with pytest.raises(ValueError, match="no wrong answer"):
        margins(np.zeros((1, 2)), np.ones((1, 2), bool))


def test_broken_scores_are_refused():
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            rank_scores(np.array([[broken, 1.0]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="no right answer"):
        rank_scores(np.zeros((1, 2)), np.zeros((1, 2), bool))


def test_two_way():
    np.testing.assert_array_equal(two_way(np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])), [1.0, 0.0, 0.5])


# --- one run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 153), (1, 40), (61, 153), (153, 153)])
def test_wilson_agrees_with_scipy(hits, n):
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_the_bootstrap_agrees_with_scipys_bca_over_prompt_means(n_seeds):
    values = drawn(np.random.default_rng(3), 0.15, 0.3, 60, n_seeds, 1)
    ours = cluster_bootstrap(values)[0]
    means = values.mean(axis=(1, 2))
    theirs = stats.bootstrap((means,), np.mean, method="BCa", n_resamples=10_000, rng=np.random.default_rng(0))
    assert ours.mean == pytest.approx(means.mean())
    step = 1 / values.size  # quantiles of a bootstrap lie on a grid
    assert (ours.lo, ours.hi) == pytest.approx(theirs.confidence_interval, abs=step + 0.001)


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_the_bootstrap_agrees_with_wilson_for_one_binary_seed(share):
    n = 400
    interval = cluster_bootstrap((np.arange(n) < share * n).astype(float)[:, None, None])[0]
    lo, hi = wilson(share, n)
    assert interval.mean == pytest.approx(share)
    assert interval.lo == pytest.approx(lo, abs=0.004) and interval.hi == pytest.approx(hi, abs=0.004)


@pytest.mark.parametrize(("n_prompts", "within"), [(40, 0.015), (153, 0.01)])
@pytest.mark.parametrize(("n_seeds", "spread"), [(1, 0.0), (4, 0.0), (4, 0.3), (4, 0.9)])
def test_the_interval_covers_the_truth_in_95_percent_of_runs(n_prompts, within, n_seeds, spread):
    """Whether the prompts differ little or much: the measurement in the docstring, in small."""
    rng, covered = np.random.default_rng(4), []
    for mean in (0.21, 0.477, 0.79):  # off the grid of 1/40, on which an interval of few prompts ends
        intervals = cluster_bootstrap(drawn(rng, mean, spread, n_prompts, n_seeds, 1000), n_draws=1000)
        covered += [interval.lo <= mean <= interval.hi for interval in intervals]
    assert np.mean(covered) == pytest.approx(0.95, abs=within)


def test_rare_outcomes_are_covered_too():
    covered = [
        i.lo <= 0.03 <= i.hi for i in cluster_bootstrap(drawn(np.random.default_rng(5), 0.03, 0.3, 153, 4, 1000))
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_have_width(value):
    interval = cluster_bootstrap(np.full((153, 4, 1), value))[0]
    assert (interval.lo, interval.hi) == wilson(value, 153)
    assert interval.hi - interval.lo > 0.02


def test_one_prompt_alone_says_little():
    interval = cluster_bootstrap(np.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 4, 1))[0]
    assert (interval.mean, interval.lo, interval.hi) == (0.25, *wilson(0.25, 1)) and interval.hi > 0.8


def test_equal_seeds_add_no_certainty_and_independent_ones_do():
    rng = np.random.default_rng(3)
    prompt = drawn(rng, 0.5, 0, 200, 1, 1)
    one, copies = cluster_bootstrap(prompt)[0], cluster_bootstrap(np.repeat(prompt, 4, 1))[0]
    assert (copies.lo, copies.hi) == pytest.approx((one.lo, one.hi), abs=1e-9)
    independent = cluster_bootstrap(drawn(rng, 0.5, 0, 200, 4, 1))[0]
    assert independent.hi - independent.lo == pytest.approx((one.hi - one.lo) / 2, rel=0.1)


def test_metrics_scored_together_equal_those_scored_alone():
    values = np.random.default_rng(5).random((50, 2, 3))
    together, alone = cluster_bootstrap(values)[1], cluster_bootstrap(values[..., 1:2])[0]
    assert (together.lo, together.hi) == pytest.approx((alone.lo, alone.hi), abs=1e-9)


def test_objects_without_a_value_are_left_out_of_that_metric_alone():
    values = np.random.default_rng(6).normal(size=(40, 2, 2))
    gaps = values.copy()
    gaps[3, :, 1], gaps[7, 0, 1] = np.nan, np.nan
    filled = np.delete(gaps, 3, axis=0)
    filled[6, 0, 1] = filled[6, 1, 1]  # prompt 7 has one seed's value
    for found, expected in zip(cluster_bootstrap(gaps), (cluster_bootstrap(values)[0], cluster_bootstrap(filled)[1])):
        assert found.to_json() == pytest.approx(expected.to_json())
    assert [interval.prompts for interval in cluster_bootstrap(gaps)] == [40, 39]


def test_nothing_to_score_is_refused():
    for nothing in (np.zeros((0, 1, 1)), np.zeros((1, 0, 1)), np.full((3, 1, 1), np.nan)):
        with pytest.raises(ValueError, match="no prompt"):
            cluster_bootstrap(nothing)


def test_variance_parts_add_up_to_the_squared_standard_error():
    values = drawn(np.random.default_rng(7), 0.4, 0.5, 100, 4, 1)[..., 0]
    between_prompts, between_seeds = variance_parts(values)
    assert between_prompts + between_seeds == pytest.approx(stats.sem(values.mean(axis=1)) ** 2)
    analysis = stats.f_oneway(*values)  # F is the ratio of mean squares, both over P * S here
    assert between_prompts / between_seeds == pytest.approx(analysis.statistic - 1)


def test_variance_parts_are_unbiased():
    runs = drawn(np.random.default_rng(8), 0.5, 0.4, 60, 3, 1500)
    parts = np.mean([variance_parts(runs[..., run]) for run in range(1500)], axis=0)
    assert parts == pytest.approx([0.4 * 0.25 / 60, 0.6 * 0.25 / 180], rel=0.02)


def test_variance_parts_at_the_edges():
    one_seed = np.array([[0.0], [1.0], [1.0], [0.0]])
    assert variance_parts(one_seed) == pytest.approx((stats.sem(one_seed[:, 0]) ** 2, 0.0))
    assert variance_parts(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx((0.0, 0.5 / 4))
    with pytest.raises(ValueError, match="two"):
        variance_parts(np.zeros((1, 4)))


# --- two runs --------------------------------------------------------------------------------------------------------


def test_a_run_does_not_differ_from_itself():
    values = drawn(np.random.default_rng(9), 0.4, 0.5, 153, 4, 1)[..., 0]
    same = paired_bootstrap(values, values)
    assert (same.mean, same.lo, same.hi, same.p_value, same.discordant) == (0.0, 0.0, 0.0, 1.0, 0)
    assert same.smallest_detectable == 0.0 and same.prompts == 153


@pytest.mark.parametrize(("share", "expected"), [(0.1, 0.072), (0.2, 0.101), (0.3, 0.124)])
def test_the_smallest_detectable_difference_by_hand(share, expected):
    """The figures of a paired comparison of 153 prompts of which a share changes, and of an unpaired one at 40 %."""
    n, changed = 153, round(153 * share / 2)
    a, b = np.zeros((n, 1)), np.zeros((n, 1))
    a[:61] = b[:61] = 1
    a[:changed], b[:changed] = 0, 1
    a[61 : 61 + changed], b[61 : 61 + changed] = 1, 0
    found = paired_bootstrap(a, b)
    assert found.mean == 0 and found.discordant == 2 * changed
    assert found.smallest_detectable == pytest.approx(expected, abs=0.003)
    assert found.smallest_detectable_unpaired == pytest.approx(0.157, abs=0.001)


def test_the_smallest_detectable_difference_is_seen_in_80_percent_of_runs():
    rng, n = np.random.default_rng(10), 153
    difference = 0.11  # of 18 % won and 7 % lost: sqrt(0.25 - 0.11²) * 2.8016 / sqrt(153) = 0.11
    seen, detectable = [], []
    for _ in range(400):
        changes = rng.choice([-1.0, 0.0, 1.0], size=(n, 1), p=[0.07, 0.75, 0.18])
        found = paired_bootstrap(np.zeros((n, 1)), changes, n_draws=500)
        seen.append(found.lo > 0)
        detectable.append(found.smallest_detectable)
    assert np.mean(detectable) == pytest.approx(difference, abs=0.002)
    assert np.mean(seen) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(("n_prompts", "n_seeds", "spread"), [(40, 4, 0.5), (153, 1, 0.95), (153, 4, 0.95)])
def test_runs_of_one_system_are_seldom_told_apart(n_prompts, n_seeds, spread):
    """With prompts that are mostly all right or all wrong, few differ, and skewness misleads."""
    rng = np.random.default_rng(11)
    apart = []
    for _ in range(500):
        both = drawn(rng, 0.4, spread, n_prompts, 2 * n_seeds, 1)[..., 0]
        found = paired_bootstrap(both[:, :n_seeds], both[:, n_seeds:], n_draws=500)
        apart.append(found.lo > 0 or found.hi < 0)
    assert np.mean(apart) < 0.075


def test_the_paired_interval_is_the_t_interval_where_both_hold():
    rng = np.random.default_rng(12)
    a, b = rng.normal(size=(40, 2)), rng.normal(size=(40, 3)) + 0.3
    found, difference = paired_bootstrap(a, b), b.mean(axis=1) - a.mean(axis=1)
    theirs = stats.ttest_1samp(difference, 0).confidence_interval()
    assert found.mean == pytest.approx(difference.mean())
    assert (found.lo, found.hi) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert found.p_value == pytest.approx(stats.ttest_rel(b.mean(axis=1), a.mean(axis=1)).pvalue, abs=0.01)


def test_the_p_value_says_what_the_interval_says():
    rng = np.random.default_rng(13)
    for _ in range(100):
        a = rng.normal(size=(50, 1))
        found = paired_bootstrap(a, a + rng.normal(0.25, 1, size=(50, 1)), n_draws=2000)
        if abs(found.p_value - 0.05) > 0.002:  # both are known to a few draws alone
            assert (found.p_value < 0.05) == (found.lo > 0 or found.hi < 0)


def test_exchanging_the_runs_turns_the_difference_round():
    rng = np.random.default_rng(14)
    a, b = drawn(rng, 0.4, 0.5, 80, 4, 1)[..., 0], drawn(rng, 0.5, 0.5, 80, 2, 1)[..., 0]
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (back.mean, back.lo, back.hi) == pytest.approx((-there.mean, -there.hi, -there.lo))
    assert back.p_value == there.p_value and back.smallest_detectable == there.smallest_detectable


def test_pairs_without_a_value_are_left_out():
    rng = np.random.default_rng(15)
    a, b = rng.normal(size=(20, 2)), rng.normal(size=(20, 1))
    kept = paired_bootstrap(a[2:], b[2:])
    a[0], b[1] = np.nan, np.nan
    assert paired_bootstrap(a, b) == kept and kept.prompts == 18
    with pytest.raises(ValueError, match="two prompts"):
        paired_bootstrap(a[:3], b[:3])


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 0), (1, 8), (20, 11), (7, 7)])
def test_mcnemar_is_the_binomial_of_those_that_changed(won, lost):
    a = np.array([False] * won + [True] * lost + [True] * 9 + [False] * 4)
    b = np.array([True] * won + [False] * lost + [True] * 9 + [False] * 4)
    tail = sum(stats.binom.pmf(k, won + lost, 0.5) for k in range(max(won, lost), won + lost + 1))
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_holm_is_the_closed_test_of_bonferroni():
    rng = np.random.default_rng(16)
    for n in (1, 2, 5):
        p = rng.random(n) ** 3
        subsets = [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]
        expected = [max(min(1.0, len(s) * p[list(s)].min()) for s in subsets if i in s) for i in range(n)]
        assert holm(p.tolist()) == pytest.approx(expected)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []
