"""Retrieval scores and their uncertainty: plain NumPy, no model, no file.

Shapes: Q queries, N gallery items, P prompts, S seeds of one prompt, M metrics scored together, D bootstrap draws.

The unit is the prompt: seeds and views of one prompt are correlated, so the bootstrap draws prompts first and then
seeds within each drawn prompt. Ties earn the expected credit of a random order, so an embedding that is the same for
everything scores exactly chance. Where every outcome is 0 or every outcome is 1 the bootstrap has no width, and
Wilson's interval on the number of prompts takes its place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

__all__ = ["Interval", "Ranks", "chance_scores", "cluster_bootstrap", "rank_scores", "two_way", "wilson"]

N_DRAWS = 10_000
TIE_DECIMALS = 6  # float32 cosines carry noise of about 1e-7: nearer than this is a tie


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    lo: float
    hi: float
    prompts: int
    seeds: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


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


def rank_scores(scores_QN: np.ndarray, hits_QN: np.ndarray) -> Ranks:
    """Rank each query's best hit. Other hits are left out: equals of the right answer are never distractors.

    Args:
        scores_QN: similarity of query and gallery item, higher is nearer.
        hits_QN: bool, the items that are right answers; at least one per query.
    Raises: ValueError on a score that is not finite, or a query without a hit.
    Example: scores [.9, .5, .5] with the hit last: above 1, tied 1, recall(1) 0, recall(2) 1/2, recall(3) 1.
    """
    if not np.isfinite(scores_QN).all():
        raise ValueError("retrieval scores hold a value that is not finite; the embeddings are broken")
    hits_QN = np.asarray(hits_QN, bool)
    if not hits_QN.any(axis=1).all():
        raise ValueError("a query has no right answer in the pool")
    rounded_QN = np.round(np.asarray(scores_QN, np.float64), TIE_DECIMALS)
    best_Q1 = np.where(hits_QN, rounded_QN, -np.inf).max(axis=1, keepdims=True)
    above_Q = ((rounded_QN > best_Q1) & ~hits_QN).sum(axis=1)
    tied_Q = ((rounded_QN == best_Q1) & ~hits_QN).sum(axis=1)
    return Ranks(above_Q, tied_Q)


def chance_scores(n_items: int, n_hits: int = 1) -> dict[str, float]:
    """What a blind guess scores when the equals of the right answer are not distractors.

    The n_hits right answers compete as one with n_items - n_hits distractors.
    """
    blind = Ranks(np.array([0]), np.array([n_items - n_hits]))
    return {"r@1": float(blind.recall(1)[0]), "r@5": float(blind.recall(5)[0]), "mrr": float(blind.reciprocal()[0])}


def two_way(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where `own` is nearer, 0 where `other` is, 1/2 on a tie. Any shape."""
    difference = np.round(np.asarray(own, np.float64) - other, TIE_DECIMALS)
    return (np.sign(difference) + 1) / 2


def wilson(mean: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion seen in n independent trials."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


@lru_cache(maxsize=4)
def _draw_counts(n_prompts: int, n_seeds: int, n_draws: int, seed: int) -> np.ndarray:
    """How often each (prompt, seed) is drawn in each draw: uint16 [D, P*S], rows sum to P*S.

    Kept, so that rows of one table share their draws: their differences are then paired.
    """
    rng = np.random.default_rng((seed, n_prompts, n_seeds))
    cells = n_prompts * n_seeds
    counts = np.empty((n_draws, cells), np.uint16)
    chunk = max(1, 4_000_000 // cells)
    for start in range(0, n_draws, chunk):
        rows = min(chunk, n_draws - start)
        prompt_RP1 = rng.integers(0, n_prompts, (rows, n_prompts, 1), dtype=np.int32)
        seed_RPS = rng.integers(0, n_seeds, (rows, n_prompts, n_seeds), dtype=np.int32) if n_seeds > 1 else 0
        cell = (prompt_RP1 * n_seeds + seed_RPS).reshape(rows, cells) + np.arange(rows)[:, None] * cells
        counts[start : start + rows] = np.bincount(cell.ravel(), minlength=rows * cells).reshape(rows, cells)
    return counts


def cluster_bootstrap(values_PSM: np.ndarray, *, n_draws: int = N_DRAWS, seed: int = 0) -> list[Interval]:
    """Mean and 95 % percentile interval of each metric, by a bootstrap over prompts, then seeds within a prompt.

    Args:
        values_PSM: outcome in [0, 1] per prompt, seed and metric.
    Returns: one Interval per metric.
    Raises: ValueError when there is nothing to score.
    """
    n_prompts, n_seeds, n_metrics = values_PSM.shape
    if n_prompts == 0 or n_seeds == 0:
        raise ValueError("no prompt to score")
    flat = np.asarray(values_PSM, np.float32).reshape(n_prompts * n_seeds, n_metrics)
    counts = _draw_counts(n_prompts, n_seeds, n_draws, seed)
    draws_DM = np.concatenate([counts[i : i + 1000].astype(np.float32) @ flat for i in range(0, n_draws, 1000)])
    lo_M, hi_M = np.percentile(draws_DM / len(flat), [2.5, 97.5], axis=0)
    intervals = []
    for metric in range(n_metrics):
        mean = float(np.asarray(values_PSM[..., metric], np.float64).mean())
        lo, hi = wilson(mean, n_prompts) if mean in (0.0, 1.0) else (float(lo_M[metric]), float(hi_M[metric]))
        intervals.append(Interval(mean, lo, hi, n_prompts, n_seeds))
    return intervals
