"""Retrieval scores and their uncertainty: NumPy and SciPy, no model, no file.

Shapes: Q queries, N gallery items, P prompts, S (or T) seeds of one prompt, M metrics scored together, D draws.

The unit is the prompt: seeds and views of one prompt are correlated, so prompts are drawn and keep their seeds. Ties
earn the expected credit of a random order, so an embedding that is the same for everything scores exactly chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from .schema import Interval

__all__ = [
    "Interval",
    "PairedDifference",
    "Ranks",
    "chance_scores",
    "cluster_bootstrap",
    "holm",
    "margins",
    "mcnemar",
    "paired_bootstrap",
    "rank_scores",
    "two_way",
    "variance_parts",
    "wilson",
]

N_DRAWS = 10_000
TIE = 1e-6  # float32 cosines carry noise of about 1e-7: nearer than this is a tie
Z_95 = 1.959963984540054  # of a two-sided 95 % interval
Z_POWER = Z_95 + 0.8416212335729143  # two-sided 5 %, 80 % power
CHUNK = 4_000_000  # numbers held at once


# --- retrieval -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Where each query's best hit stands among the distractors.

    Args:
        above_Q: distractors scored strictly higher than the best hit.
        tied_Q: distractors with the same score as the best hit.
    """

    above_Q: np.ndarray
    tied_Q: np.ndarray

    def recall(self, k: int) -> np.ndarray:
        """Expected credit at rank k: the share of the tied block's places within the first k. [Q] in [0, 1]."""
        return np.clip((k - self.above_Q) / (self.tied_Q + 1), 0.0, 1.0)

    def reciprocal(self) -> np.ndarray:
        """Expected 1/rank over the tied block's places. [Q] in (0, 1]."""
        harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, (self.above_Q + self.tied_Q).max() + 2))])
        return (harmonic[self.above_Q + self.tied_Q + 1] - harmonic[self.above_Q]) / (self.tied_Q + 1)

    def expected(self) -> np.ndarray:
        """Mean rank over the tied block's places, the first place being 1. [Q]"""
        return 1 + self.above_Q + self.tied_Q / 2


def rank_scores(scores_QN: np.ndarray, hits_QN: np.ndarray) -> Ranks:
    """Rank each query's best hit. Other hits are left out: equals of the right answer are never distractors.

    Args:
        scores_QN: similarity of query and gallery item, higher is nearer.
        hits_QN: bool, the items that are right answers; at least one per query.
    Raises: ValueError on a score that is not finite, or a query without a hit.
    Example: scores [.9, .5, .5] with the hit last: above 1, tied 1, recall(1) 0, recall(2) 1/2, recall(3) 1.
    """
    ahead_QN, is_distractor_QN = _ahead_of_best_hit(scores_QN, hits_QN)
    above_Q = ((ahead_QN > TIE) & is_distractor_QN).sum(axis=1)
    tied_Q = ((np.abs(ahead_QN) <= TIE) & is_distractor_QN).sum(axis=1)
    return Ranks(above_Q, tied_Q)


def margins(scores_QN: np.ndarray, hits_QN: np.ndarray) -> np.ndarray:
    """Score of the best hit less that of the best distractor, [Q]; above `TIE` if and only if recall(1) is 1.

    Raises: ValueError as `rank_scores`, and for a query to which every item is a right answer.
    """
    ahead_QN, is_distractor_QN = _ahead_of_best_hit(scores_QN, hits_QN)
    if not is_distractor_QN.any(axis=1).all():
        raise ValueError("a query has no wrong answer in the gallery, so it has no margin")
    return -np.where(is_distractor_QN, ahead_QN, -np.inf).max(axis=1)


def _ahead_of_best_hit(scores_QN: np.ndarray, hits_QN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much each item is nearer than the query's best hit, and which items are distractors."""
    if not np.isfinite(scores_QN).all():
        raise ValueError("retrieval scores hold a value that is not finite; the embeddings are broken")
    hits_QN = np.asarray(hits_QN, bool)
    if not hits_QN.any(axis=1).all():
        raise ValueError("a query has no right answer in the gallery")
    scores_QN = np.asarray(scores_QN, np.float64)
    return scores_QN - np.where(hits_QN, scores_QN, -np.inf).max(axis=1, keepdims=True), ~hits_QN


def chance_scores(n_items: int, n_hits: int = 1) -> dict[str, float]:
    """What a blind guess scores when the equals of the right answer are not distractors.

    The n_hits right answers compete as one with n_items - n_hits distractors.
    """
    blind = Ranks(np.array([0]), np.array([n_items - n_hits]))
    return {**{f"r@{k}": float(blind.recall(k)[0]) for k in (1, 5, 10)}, "mrr": float(blind.reciprocal()[0])}


def two_way(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where `own` is nearer, 0 where `other` is, 1/2 on a tie. Any shape."""
    difference = np.asarray(own, np.float64) - other
    return np.where(np.abs(difference) <= TIE, 0.5, difference > 0)


# --- one run ---------------------------------------------------------------------------------------------------------


def wilson(mean: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion seen in n independent trials."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def cluster_bootstrap(
    values_PSM: np.ndarray, *, shares: bool = True, n_draws: int = N_DRAWS, seed: int = 0
) -> list[Interval]:
    """Mean over prompts (of the mean over their seeds) of each metric, and its 95 % interval by a BCa bootstrap.

    Prompts are drawn and keep their seeds; the interval is corrected for bias and skewness (BCa: Efron, "Better
    Bootstrap Confidence Intervals", 1987). Where every outcome is 0 or every outcome is 1, or there is one prompt
    alone, the bootstrap has no width: there Wilson's interval of so many prompts takes its place.

    Why this one: its coverage in percent, measured on 4,000 simulated runs of each kind: binary outcomes, 1 or 4 seeds,
    prompts of beta-distributed difficulty that makes 0 to 0.9 of the variance. Lowest and highest over the kinds:

        prompts   mean score     prompts, then seeds   prompts, percentile   prompts, BCa
        40        0.21 to 0.79   92.6 to 99.1          92.6 to 94.8          93.8 to 96.2
        153       0.21 to 0.79   93.8 to 99.1          93.7 to 95.4          94.3 to 95.6
        153       0.02 to 0.07   87.1 to 98.9          86.9 to 94.8          93.4 to 98.2

    Drawing seeds within the drawn prompts counts their variance twice; percentiles are too narrow for few prompts and
    for rare outcomes.

    Args:
        values_PSM: outcome per prompt, seed and metric. NaN where an object has no value: the prompt's mean is that of
            its other seeds, and a prompt without any is left out of that metric.
        shares: the outcomes are in [0, 1]; of others Wilson's interval says nothing, and a constant has no width.
    Returns: one Interval per metric.
    Raises: ValueError when there is nothing to score, in all or in one metric.
    """
    n_seeds = values_PSM.shape[1]
    means_PM = _prompt_means(values_PSM)
    has_value_PM = ~np.isnan(means_PM)
    if means_PM.size == 0 or not has_value_PM.any(axis=0).all():
        raise ValueError("no prompt to score")
    ends: dict[int, tuple[float, float]] = {}
    for chosen_P in np.unique(has_value_PM, axis=1).T:
        columns = np.flatnonzero((has_value_PM == chosen_P[:, None]).all(axis=0))
        ends |= zip(columns.tolist(), _bca(means_PM[np.ix_(chosen_P, columns)], shares, n_draws, seed))
    means_M, prompts_M = np.nanmean(means_PM, axis=0).tolist(), has_value_PM.sum(axis=0).tolist()
    return [
        Interval(mean=mean, lo=ends[m][0], hi=ends[m][1], prompts=prompts, seeds=n_seeds)
        for m, (mean, prompts) in enumerate(zip(means_M, prompts_M))
    ]


def variance_parts(values_PS: np.ndarray) -> tuple[float, float]:
    """What prompts, and what seeds of one prompt, add to the variance of the mean: (between prompts, between seeds).

    Components of a balanced one-way layout with random effects, by the ANOVA estimator (Searle, Casella and McCulloch,
    "Variance Components", 1992, ch. 3); their sum is the squared standard error. Where the seeds of a prompt differ
    more than prompts do, the prompts' part is 0, and the sum larger than that square.

    With one seed the two cannot be told apart, and all of it is counted as the prompts'. More seeds make the second
    part smaller, more prompts make both.

    Raises: ValueError for fewer than two prompts.
    """
    n_prompts, n_seeds = values_PS.shape
    if n_prompts < 2:
        raise ValueError("the variance between prompts needs two of them")
    squared_error = float(values_PS.mean(axis=1).var(ddof=1)) / n_prompts
    if n_seeds == 1:
        return squared_error, 0.0
    between_seeds = float(values_PS.var(axis=1, ddof=1).mean()) / (n_prompts * n_seeds)
    return max(0.0, squared_error - between_seeds), between_seeds


# --- two runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedDifference:
    """B - A over the same prompts.

    mean, lo, hi: of the difference, with its 95 % interval.
    p_value: two-sided, of no difference; below 0.05 where the interval leaves out 0 (but for the draws' noise).
    prompts: with a value in both; discordant: of them, those whose means differ.
    smallest_detectable: the true difference that so many prompts would show with 80 % power (two-sided, 5 %).
    smallest_detectable_unpaired: the same if the two runs had had prompts of their own.
    """

    mean: float
    lo: float
    hi: float
    p_value: float
    prompts: int
    discordant: int
    smallest_detectable: float
    smallest_detectable_unpaired: float


def paired_bootstrap(a_PS: np.ndarray, b_PT: np.ndarray, *, n_draws: int = N_DRAWS, seed: int = 0) -> PairedDifference:
    """Difference B - A of the prompts' means, by a bootstrap over the prompts that both have.

    The interval is the percentile one, its level widened for few prompts as a t interval is (Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015, section 3.2); p_value is the level at which it would end at 0.
    Not BCa as for one run: where few prompts differ, the skewness seen in their differences is chance. Of simulated
    pairs of runs of one system (40 or 153 prompts, 1 or 4 seeds) BCa told up to 12 % apart, this at most 6 %.

    Args:
        a_PS, b_PT: outcomes per prompt and seed, row by row of the same prompts; NaN as in `cluster_bootstrap`.
    Raises: ValueError for fewer than two prompts with a value in both.
    Example: 153 prompts of which 31 change, as many for the better as for the worse: 0.102 is the smallest detectable.
    """
    pairs_P2 = np.stack([_prompt_means(a_PS[..., None])[:, 0], _prompt_means(b_PT[..., None])[:, 0]], axis=1)
    pairs_P2 = pairs_P2[~np.isnan(pairs_P2).any(axis=1)]
    n_prompts = len(pairs_P2)
    if n_prompts < 2:
        raise ValueError("a paired comparison needs two prompts")
    difference_P = pairs_P2[:, 1] - pairs_P2[:, 0]
    draws_D = _bootstrap_means(difference_P[:, None], n_draws, seed)[:, 0]
    widen = np.sqrt(n_prompts / (n_prompts - 1))
    tail = stats.norm.cdf(widen * stats.t.ppf(0.025, n_prompts - 1))
    lo, hi = np.quantile(draws_D, [tail, 1 - tail])
    beyond = (1 + min((draws_D <= 0).sum(), (draws_D >= 0).sum())) / (1 + n_draws)
    p_value = 2 * stats.t.cdf(stats.norm.ppf(beyond) / widen, n_prompts - 1)
    to_detect = Z_POWER / np.sqrt(n_prompts)
    return PairedDifference(
        mean=float(difference_P.mean()),
        lo=float(lo),
        hi=float(hi),
        p_value=float(min(1.0, p_value)),
        prompts=n_prompts,
        discordant=int((difference_P != 0).sum()),
        smallest_detectable=float(to_detect * difference_P.std(ddof=1)),
        smallest_detectable_unpaired=float(to_detect * np.sqrt(pairs_P2.var(axis=0, ddof=1).sum())),
    )


def mcnemar(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test: are the prompts that changed as often won as lost?

    a_P, b_P: bool, whether A and B are right on the prompt.
    """
    lost, won = int((a_P & ~b_P).sum()), int((b_P & ~a_P).sum())
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, so that 5 % bounds the chance of any false alarm among them (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted.tolist()


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def _prompt_means(values_PSM: np.ndarray) -> np.ndarray:
    """[P, M], means over the seeds that have a value; NaN where none has."""
    values_PSM = np.asarray(values_PSM, np.float64)
    count_PM = (~np.isnan(values_PSM)).sum(axis=1)
    return np.where(count_PM > 0, np.nansum(values_PSM, axis=1) / np.maximum(count_PM, 1), np.nan)


def _bca(means_PM: np.ndarray, shares: bool, n_draws: int, seed: int) -> Iterator[tuple[float, float]]:
    """BCa intervals of the columns' means; Wilson's where they are all 0 or all 1, or of one prompt."""
    n_prompts = len(means_PM)
    # Centred first, so that draws equal to the mean are so to the last digits.
    centre_M = means_PM.mean(axis=0)
    centred_PM = means_PM - centre_M
    draws_DM = _bootstrap_means(centred_PM, n_draws, seed)
    for metric, (centre, centred_P) in enumerate(zip(centre_M.tolist(), centred_PM.T)):
        if (means_PM[:, metric] == means_PM[0, metric]).all():
            is_share = shares and (means_PM[0, metric] in (0.0, 1.0) or n_prompts == 1)
            yield wilson(means_PM[0, metric], n_prompts) if is_share else (centre, centre)
            continue
        draws_D = draws_DM[:, metric]
        noise = 1e-9 * np.abs(centred_P).max()
        below = ((draws_D < -noise).mean() + (draws_D <= noise).mean()) / 2  # ties count half
        bias = stats.norm.ppf(np.clip(below, 1 / n_draws, 1 - 1 / n_draws))
        acceleration = (centred_P**3).sum() / (6 * (centred_P**2).sum() ** 1.5)  # the jackknife's, of a mean
        z_2 = bias + np.array([-Z_95, Z_95])
        lo, hi = centre + np.quantile(draws_D, stats.norm.cdf(bias + z_2 / (1 - acceleration * z_2)))
        yield (max(0.0, float(lo)), min(1.0, float(hi))) if shares else (float(lo), float(hi))  # rounding, no more


def _bootstrap_means(values_PM: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
    """Means of prompts drawn with replacement, [D, M]."""
    counts_DP = _draw_counts(len(values_PM), n_draws, seed)
    rows = max(1, CHUNK // len(values_PM))
    sums = [counts_DP[i : i + rows].astype(np.float64) @ values_PM for i in range(0, n_draws, rows)]
    return np.concatenate(sums) / len(values_PM)


@lru_cache(maxsize=2)
def _draw_counts(n_prompts: int, n_draws: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn in each draw: uint8 [D, P], rows sum to P; 100 MB for 10,000 prompts.

    Kept for the next rows of a table. A count beyond 255 has a chance of less than 1e-500.
    """
    rng = np.random.default_rng((seed, n_prompts))
    counts_DP = np.empty((n_draws, n_prompts), np.uint8)
    chunk = max(1, CHUNK // n_prompts)
    for start in range(0, n_draws, chunk):
        rows = min(chunk, n_draws - start)
        cell_RP = rng.integers(0, n_prompts, (rows, n_prompts)) + n_prompts * np.arange(rows)[:, None]
        counts_DP[start : start + rows] = np.bincount(cell_RP.ravel(), minlength=rows * n_prompts).reshape(rows, -1)
    return counts_DP
