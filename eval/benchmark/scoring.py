"""From embeddings to tables: retrieval in a gallery, and the two-way choice between a caption and its swaps.

Pure NumPy. Shapes: P prompts, S seeds, V views, N captions (or pictures) of a gallery, D embedding width, M metrics.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .prompts import Prompt
from .schema import METRICS, Interval
from .statistics import chance_scores, cluster_bootstrap, margins, rank_scores, two_way

__all__ = [
    "Objects",
    "Retrieved",
    "chance",
    "from_the_front",
    "metrics_of",
    "rank_counts",
    "retrieve",
    "shuffled",
    "two_way_by_kind",
]

KIND_GROUPS = {"parts": "order", "relation": "order", "colors": "binding", "shapes": "binding"}
PROMPTS_AT_ONCE = 64
# Relations that hold in an object's frame as seen from its front: from behind, left is right.
VIEW_DEPENDENT = re.compile(r"\b(left|right|in front of|behind)\b")
FRONTAL_DEG = 45.0


@dataclass(frozen=True)
class Objects:
    """A row of the table: objects as an evaluator sees them in one shading.

    Args:
        name: of the row.
        embeddings_PSVD: float32, unit norm; what stands at missed objects is ignored.
        missed_PS: bool, objects that count as a miss.
        present_P: bool, prompts that this row has objects for (a control may lack some).
        azimuths_deg: of the views, where they are the protocol's.
    """

    name: str
    embeddings_PSVD: np.ndarray
    missed_PS: np.ndarray
    present_P: np.ndarray
    azimuths_deg: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Retrieved:
    """Each object's place in a gallery.

    Args:
        scores_PSM: r@1, r@5, r@10, mrr, cosine, margin; of a missed object 0 in the first four, NaN in the others.
        rank_PS: of its own caption, mean over the views that are scored; infinite where missed.
        nearest_PSV: place in the gallery of the caption nearest to each view, -1 where missed or not scored.
        right_PSV: r@1 of each view by itself.
    """

    scores_PSM: np.ndarray
    rank_PS: np.ndarray
    nearest_PSV: np.ndarray
    right_PSV: np.ndarray

    def nearest(self, prompt: int, seed: int) -> int:
        """The caption that most views are nearest to; the first of the gallery among equals."""
        nearest_V = self.nearest_PSV[prompt, seed]
        counts = Counter(nearest_V[nearest_V >= 0].tolist() or [-1])
        return min(counts, key=lambda place: (-counts[place], place))


def from_the_front(prompt: Prompt) -> bool:
    """Whether a swap of the prompt is true of its object seen from behind, as left and right are."""
    return bool(VIEW_DEPENDENT.search(prompt.text)) and any(_group_of(swap.kind) == "order" for swap in prompt.swaps)


def retrieve(
    objects: Objects,
    gallery_ND: np.ndarray,
    hits_PN: np.ndarray,
    aggregation: str,
    frontal_P: np.ndarray | None = None,
) -> Retrieved:
    """Rank the gallery for every object. The aggregations are `protocol.Protocol`'s.

    Args:
        frontal_P: bool, prompts that are scored by the views within 45 degrees of the front alone, where there are
            such; `right_PSV` is of all views.
    """
    if frontal_P is not None and frontal_P.any() and (frontal_V := _frontal(objects)) is not None:
        return _merged(objects, gallery_ND, hits_PN, aggregation, frontal_P, frontal_V)
    n_prompts, n_seeds, n_views = objects.embeddings_PSVD.shape[:3]
    scores_PSM = np.zeros((n_prompts, n_seeds, len(METRICS)))
    scores_PSM[..., 4:] = np.nan
    rank_PS = np.full((n_prompts, n_seeds), np.inf)
    nearest_PSV = np.full((n_prompts, n_seeds, n_views), -1)
    right_PSV = np.zeros((n_prompts, n_seeds, n_views))
    gallery_DN = gallery_ND.T.astype(np.float64)
    there_PS = ~objects.missed_PS & objects.present_P[:, None]
    for start in range(0, n_prompts, PROMPTS_AT_ONCE):
        prompt_K, seed_K = np.nonzero(there_PS[start : start + PROMPTS_AT_ONCE])
        if not len(prompt_K):
            continue
        at = (prompt_K + start, seed_K)
        views_KVD = objects.embeddings_PSVD[at].astype(np.float64)
        cosines_KVN = views_KVD @ gallery_DN
        hits_KN = hits_PN[at[0]]
        nearest_PSV[at] = cosines_KVN.argmax(axis=2)
        by_view_KVM, ranks_KV = _metrics(cosines_KVN, hits_KN)
        right_PSV[at] = by_view_KVM[..., 0]
        if aggregation == "mean embedding":
            by_view_KVM, ranks_KV = _metrics(_unit(views_KVD.mean(axis=1, keepdims=True)) @ gallery_DN, hits_KN)
        elif aggregation == "best view":
            by_view_KVM, ranks_KV = _metrics(cosines_KVN.max(axis=1, keepdims=True), hits_KN)
        any_view = aggregation == "any view"
        scores_PSM[at] = by_view_KVM.max(axis=1) if any_view else by_view_KVM.mean(axis=1)
        rank_PS[at] = ranks_KV.min(axis=1) if any_view else ranks_KV.mean(axis=1)
    return Retrieved(scores_PSM, rank_PS, nearest_PSV, right_PSV)


def _merged(
    objects: Objects,
    gallery_ND: np.ndarray,
    hits_PN: np.ndarray,
    aggregation: str,
    frontal_P: np.ndarray,
    frontal_V: np.ndarray,
) -> Retrieved:
    """Scores and ranks from the front for some prompts, from all views for the others; the rest from all views."""
    whole = retrieve(objects, gallery_ND, hits_PN, aggregation)
    seen = replace(objects, embeddings_PSVD=objects.embeddings_PSVD[:, :, frontal_V], azimuths_deg=None)
    front = retrieve(seen, gallery_ND, hits_PN, aggregation)
    nearest_PSV = whole.nearest_PSV.copy()
    nearest_PSV[np.ix_(frontal_P, np.ones(nearest_PSV.shape[1], bool), ~frontal_V)] = -1
    return Retrieved(
        np.where(frontal_P[:, None, None], front.scores_PSM, whole.scores_PSM),
        np.where(frontal_P[:, None], front.rank_PS, whole.rank_PS),
        nearest_PSV,
        whole.right_PSV,
    )


def metrics_of(retrieved: Retrieved, chosen_P: np.ndarray) -> dict[str, Interval]:
    """Means and intervals over the chosen prompts; cosine and margin over those that have an object."""
    values_PSM = retrieved.scores_PSM[chosen_P]
    found = dict(zip(METRICS[:4], cluster_bootstrap(values_PSM[..., :4]), strict=True))
    for metric in (4, 5):  # cosine, margin
        if not np.isnan(values_PSM[..., metric]).all():
            found[METRICS[metric]] = cluster_bootstrap(values_PSM[..., metric, None], shares=False)[0]
    return found


def chance(hits_PN: np.ndarray) -> dict[str, Interval]:
    """What blind guessing scores, mean over the prompts."""
    n_prompts, n_items = hits_PN.shape
    blind = [chance_scores(n_items, int(hits)) for hits in hits_PN.sum(axis=1)]
    means = {metric: float(np.mean([one[metric] for one in blind])) for metric in METRICS[:4]}
    return {m: Interval(mean=v, lo=v, hi=v, prompts=n_prompts, seeds=1) for m, v in means.items()}


def shuffled(objects: Objects, seed: int = 0) -> Objects:
    """Each object against the caption of another prompt, drawn once: must score near chance."""
    ring = np.random.default_rng(seed).permutation(len(objects.present_P))
    other = np.empty_like(ring)
    other[ring] = np.roll(ring, 1)
    return Objects(
        "shuffled prompts", objects.embeddings_PSVD[other], objects.missed_PS[other], objects.present_P[other]
    )


def rank_counts(retrieved: Retrieved, n_items: int) -> tuple[list[int], list[int]]:
    """Upper ranks of bins (1, 2, 5, 10, 20, 50, …) and the objects in each; the missed are the last count."""
    edges = [e for e in (m * 10**p for p in range(7) for m in (1, 2, 5)) if e < n_items] + [n_items]
    ranks = np.sort(np.round(retrieved.rank_PS[np.isfinite(retrieved.rank_PS)]))
    below = np.searchsorted(ranks, edges, side="right")
    counts = np.diff(below, prepend=0).tolist()
    return edges, [*counts, int(np.isinf(retrieved.rank_PS).sum())]


def two_way_by_kind(
    objects: Objects, prompts: Sequence[Prompt], captions: Mapping[str, np.ndarray], aggregation: str
) -> dict[str, np.ndarray]:
    """How often an object is nearer to its caption than to a swap of it, [P, S] by kind of swap; chance is 1/2.

    "order" joins exchanged parts and inverted relations, "binding" exchanged colours and shapes, "any" all of them.
    Several swaps of one kind and prompt are averaged first. Missed objects are wrong. Left, right, in front and behind
    are judged from the views within 45 degrees of the front, where there are such. NaN for prompts without such a swap.

    Args:
        captions: text to unit embedding [D].
    """
    n_prompts, n_seeds = objects.missed_PS.shape
    frontal_V = _frontal(objects)
    by_kind: dict[str, np.ndarray] = defaultdict(lambda: np.full((n_prompts, n_seeds), np.nan))
    for place, prompt in enumerate(prompts):
        if not prompt.swaps or not objects.present_P[place]:
            continue
        outcomes: dict[str, list[np.ndarray]] = defaultdict(list)
        for swap in prompt.swaps:
            views_SVD = objects.embeddings_PSVD[place]
            if frontal_V is not None and _group_of(swap.kind) == "order" and VIEW_DEPENDENT.search(prompt.text):
                views_SVD = views_SVD[:, frontal_V]
            won_S = _won(views_SVD.astype(np.float64), captions[prompt.text], captions[swap.text], aggregation)
            for kind in {swap.kind, _group_of(swap.kind), "any"}:
                outcomes[kind].append(np.where(objects.missed_PS[place], 0.0, won_S))
        for kind, won in outcomes.items():
            by_kind[kind][place] = np.mean(won, axis=0)
    order = ["order", "binding", *KIND_GROUPS]
    return dict(sorted(by_kind.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _group_of(kind: str) -> str:
    return KIND_GROUPS.get(kind, kind)


def _won(views_SVD: np.ndarray, own_D: np.ndarray, other_D: np.ndarray, aggregation: str) -> np.ndarray:
    """[S]: 1 where the own caption is nearer, 1/2 on a tie."""
    if aggregation == "mean embedding":
        views_SVD = _unit(views_SVD.mean(axis=1, keepdims=True))
    own_SV, other_SV = views_SVD @ own_D.astype(np.float64), views_SVD @ other_D.astype(np.float64)
    if aggregation == "best view":
        return two_way(own_SV.max(axis=1), other_SV.max(axis=1))
    won_SV = two_way(own_SV, other_SV)
    return won_SV.max(axis=1) if aggregation == "any view" else won_SV.mean(axis=1)


def _metrics(cosines_KVN: np.ndarray, hits_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metrics [K, V, M] and expected ranks [K, V] of every view."""
    n_objects, n_views, n_items = cosines_KVN.shape
    flat_QN, hits_QN = cosines_KVN.reshape(-1, n_items), np.repeat(hits_KN, n_views, axis=0)
    ranks = rank_scores(flat_QN, hits_QN)
    own_Q = np.where(hits_QN, flat_QN, -np.inf).max(axis=1)
    has_wrong_Q = ~hits_QN.all(axis=1)
    margin_Q = np.full(len(own_Q), np.nan)  # none where every caption is right
    margin_Q[has_wrong_Q] = margins(flat_QN[has_wrong_Q], hits_QN[has_wrong_Q])
    columns = [*(ranks.recall(k) for k in (1, 5, 10)), ranks.reciprocal(), own_Q, margin_Q]
    return np.stack(columns, axis=-1).reshape(n_objects, n_views, -1), ranks.expected().reshape(n_objects, n_views)


def _frontal(objects: Objects) -> np.ndarray | None:
    """bool [V], or None where no view (or no known one) is frontal."""
    if objects.azimuths_deg is None:
        return None
    frontal_V = np.abs((np.array(objects.azimuths_deg) + 180) % 360 - 180) <= FRONTAL_DEG
    return frontal_V if frontal_V.any() else None


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
