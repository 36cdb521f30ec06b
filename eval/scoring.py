"""From embeddings to tables: retrieval in each pool, and the two-way choice between a caption and its swaps.

Pure NumPy. Shapes: P prompts, S seeds, N captions of a pool, D embedding width, M metrics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .prompts import Pool, Prompt
from .statistics import Interval, chance_scores, cluster_bootstrap, rank_scores, two_way

__all__ = ["METRICS", "Objects", "Row", "find", "retrieval_rows", "retrieval_values", "shuffled", "two_way_rows"]

METRICS = ("r@1", "r@5", "mrr")
KIND_GROUPS = {"parts": "order", "relation": "order", "colors": "binding", "shapes": "binding"}


@dataclass(frozen=True)
class Objects:
    """What one row of the table is made of.

    Args:
        name: of the row.
        embeddings: float32 [P, S, D], unit norm; what stands at empty objects is ignored.
        empty: bool [P, S], objects without a surface: always a miss.
    """

    name: str
    embeddings: np.ndarray
    empty: np.ndarray


@dataclass(frozen=True)
class Row:
    """One line of a table: scores of a row of objects, in one pool (or kind of swap) and one group of prompts."""

    row: str
    pool: str
    group: str
    scores: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        scores = {name: interval.to_json() for name, interval in self.scores.items()}
        return {"row": self.row, "pool": self.pool, "group": self.group, **scores}


def retrieval_values(objects: Objects, pool_ND: np.ndarray, hits_PN: np.ndarray) -> np.ndarray:
    """R@1, R@5 and reciprocal rank of each object, [P, S, 3]; an empty object has 0 in all."""
    n_prompts, n_seeds, width = objects.embeddings.shape
    filled = np.where(objects.empty[..., None], 0, objects.embeddings)
    scores = filled.reshape(-1, width).astype(np.float64) @ pool_ND.T.astype(np.float64)
    ranks = rank_scores(scores, np.repeat(hits_PN, n_seeds, axis=0))
    values = np.stack([ranks.recall(1), ranks.recall(5), ranks.reciprocal()], axis=-1)
    values[objects.empty.reshape(-1)] = 0.0
    return values.reshape(n_prompts, n_seeds, len(METRICS))


def shuffled(objects: Objects, seed: int = 0) -> Objects:
    """Each object against the caption of another one, drawn once: must score near chance."""
    ring = np.random.default_rng(seed).permutation(len(objects.embeddings))
    other = np.empty_like(ring)
    other[ring] = np.roll(ring, 1)
    return Objects("shuffled prompts", objects.embeddings[other], objects.empty[other])


def retrieval_rows(
    rows: Sequence[Objects],
    pool: Pool,
    pool_ND: np.ndarray,
    hits_PN: np.ndarray,
    masks: Mapping[str, np.ndarray],
) -> list[Row]:
    """Every row in every group of prompts, and the row of blind guessing."""
    values = [(objects.name, retrieval_values(objects, pool_ND, hits_PN)) for objects in rows]
    blind = np.array(list(chance_scores(len(pool.captions)).values()))
    table = []
    for group, mask in masks.items():
        for name, values_PSM in values:
            table.append(
                Row(name, pool.name, group, dict(zip(METRICS, cluster_bootstrap(values_PSM[mask]), strict=True)))
            )
        count = int(mask.sum())
        chance = {m: Interval(float(v), float(v), float(v), count, 1) for m, v in zip(METRICS, blind, strict=True)}
        table.append(Row("chance", pool.name, group, chance))
    return table


def two_way_rows(
    rows: Sequence[Objects], prompts: Sequence[Prompt], text: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]
) -> list[Row]:
    """How often an object is nearer to its caption than to a swap of it, by kind of swap; chance is 1/2.

    "order" joins exchanged parts and inverted relations, "binding" exchanged colours and shapes, "any" all of them.
    Several swaps of one kind and prompt are averaged first. Empty objects are misses.

    Args:
        text: caption to unit embedding [D].
        masks: groups of prompts.
    """
    table = []
    for objects in rows:
        by_kind = _two_way_values(objects, prompts, text)
        for group, mask in masks.items():
            for kind, values_PS in by_kind.items():
                chosen = mask & ~np.isnan(values_PS[:, 0])
                if chosen.any():
                    accuracy = cluster_bootstrap(values_PS[chosen][..., None])[0]
                    table.append(Row(objects.name, kind, group, {"accuracy": accuracy}))
    return table


def _two_way_values(
    objects: Objects, prompts: Sequence[Prompt], text: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Per kind of swap, group of kinds and `any`, accuracy [P, S]; NaN for prompts without such a swap."""
    n_prompts, n_seeds = objects.empty.shape
    by_kind: dict[str, np.ndarray] = defaultdict(lambda: np.full((n_prompts, n_seeds), np.nan))
    for place, prompt in enumerate(prompts):
        own_S = objects.embeddings[place] @ text[prompt.caption]
        outcomes: dict[str, list[np.ndarray]] = defaultdict(list)
        for swap in prompt.swaps:
            won_S = two_way(own_S, objects.embeddings[place] @ text[swap.caption])
            for kind in {swap.kind, KIND_GROUPS.get(swap.kind, swap.kind), "any"}:
                outcomes[kind].append(np.where(objects.empty[place], 0.0, won_S))
        for kind, won in outcomes.items():
            by_kind[kind][place] = np.mean(won, axis=0)
    order = ["order", "binding", *KIND_GROUPS]
    return dict(sorted(by_kind.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def find(rows: Sequence[Mapping[str, Any]], row: str, pool: str, group: str, metric: str) -> dict[str, Any] | None:
    """The interval of one cell in the rows of a results.json, or None where there is no such row."""
    for entry in rows:
        if (entry["row"], entry["pool"], entry["group"]) == (row, pool, group):
            return entry.get(metric)
    return None
