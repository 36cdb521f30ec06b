"""How near two sets of objects are to each other: Fréchet distance, KID, CMMD of features; COV, MMD, 1-NNA of points.

A row of a feature matrix is one *object*, never one view: views of an object are not independent, and adding them
adds rows without adding information. Every estimate here depends on the number of objects, most through a bias, so
each has a least number and gives a reason, not a number, below it:

    Fréchet      max(2048, D) on either side, and the same number: it is biased by about 1/n, and its covariances
                 have no full rank below D.
    KID, CMMD    50: both are unbiased, but an interval from less says nothing.
    COV, MMD, 1-NNA    20, and the same number: all three move with it, and the chance level of the last is 50 % only
                 for equal sets.

Intervals are over objects, by subsets of half of each side without replacement: for an unbiased mean over objects (or
over pairs of them) such halves spread as the whole does about the truth (the delete-half jackknife), where a bootstrap
would draw objects twice and find them equal to themselves. Between equal distributions, where the estimate varies
with 1/n instead of 1/sqrt(n), the interval is too wide, never too narrow.

Plain NumPy and SciPy in float64. Shapes: N and M objects of the two sides, D features, R subsets, B rows of a block,
K clouds of P points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from scipy.spatial import cKDTree

from ...errors import UserError
from ...progress import Bar

__all__ = ["Estimate", "chamfer_matrix", "cmmd", "frechet_distance", "kid", "point_set_scores"]

LEAST_FRECHET, LEAST_MMD, LEAST_SETS = 2048, 50, 20
N_SUBSETS = 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK_ROWS = 512  # of a kernel matrix held at a time
QUERY_POINTS = 1 << 20  # looked up in one tree at a time

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A value with the 95 % interval over objects."""

    value: float
    lo: float
    hi: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


# ------------------------------------------------------------------------------------------------------ of features


def frechet_distance(features_ND: np.ndarray, others_ND: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6), squared as is usual.

    |m - m'|^2 + tr S + tr S' - 2 tr (S S')^(1/2), with covariances over n - 1.

    With centred features QR, S = R^T R / (n - 1), and the last trace is the sum of the singular values of R R'^T over
    n - 1: they are real and not negative whatever the rounding, which the square root of the matrix S S' is not.

    Raises: UserError for fewer than max(2048, D) objects or unequal numbers; ValueError for features that are not
        finite matrices of one width.
    Example: two Gaussians of equal covariance whose means are d apart have d^2.
    """
    _check(features_ND, others_ND)
    (n, width), n_others = features_ND.shape, len(others_ND)
    least = max(LEAST_FRECHET, width)
    if min(n, n_others) < least:
        raise UserError(
            f"the Fréchet distance of {width} features needs at least {least} objects on either side, "
            f"there are {n} and {n_others}: look at KID and CMMD"
        )
    if n != n_others:
        raise UserError(
            f"the Fréchet distance is biased by the number of objects and needs the same on both sides, "
            f"there are {n} and {n_others}"
        )
    means, roots = zip(*map(_gaussian, (features_ND, others_ND)), strict=True)
    traces = sum(float(np.square(root_DD).sum()) for root_DD in roots)
    cross = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return float(np.square(means[0] - means[1]).sum()) + traces - 2 * cross


def kid(features_ND: np.ndarray, others_MD: np.ndarray, *, n_subsets: int = N_SUBSETS, seed: int = 0) -> Estimate:
    """Kernel distance (Bińkowski et al. 2018): the unbiased squared MMD with the kernel (x . y / D + 1)^3.

    Not multiplied by 100 or 1000, as some tables are. About 0, and as often below it, for equal distributions.

    Args:
        n_subsets: halves of the objects that the interval is made of.
    Raises: UserError for fewer than 50 objects on a side; ValueError as `frechet_distance`.
    """
    width = features_ND.shape[-1]
    return _mmd2("KID", lambda a, b: (a @ b.T / width + 1) ** 3, features_ND, others_MD, n_subsets, seed)


def cmmd(features_ND: np.ndarray, others_MD: np.ndarray, *, n_subsets: int = N_SUBSETS, seed: int = 0) -> Estimate:
    """CLIP-MMD (Jayasumana et al. 2024, Rethinking FID): 1000 times the squared MMD of CLIP's unit image features with
    the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma 10.

    The estimate is the unbiased one, eq. 4 there. The code its authors released keeps each object's kernel with
    itself, which adds to it about 1000 (1 - mean kernel) (1/N + 1/M): some hundredths at a thousand objects.

    Raises: UserError for fewer than 50 objects on a side; ValueError for features that are not of unit length, and as
        `frechet_distance`.
    """
    for rows in (features_ND, others_MD):
        if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3):
            raise ValueError("CMMD is defined for features of unit length")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
        return CMMD_SCALE * np.exp(-squared / (2 * CMMD_SIGMA**2))

    return _mmd2("CMMD", kernel, features_ND, others_MD, n_subsets, seed)


def _mmd2(
    name: str, kernel: Kernel, features_ND: np.ndarray, others_MD: np.ndarray, n_subsets: int, seed: int
) -> Estimate:
    """The unbiased squared MMD (Gretton et al. 2012, eq. 3) with the interval of halves; no matrix [N, M] is held."""
    _check(features_ND, others_MD)
    if min(len(features_ND), len(others_MD)) < LEAST_MMD:
        raise UserError(
            f"{name} needs at least {LEAST_MMD} objects on either side, "
            f"there are {len(features_ND)} and {len(others_MD)}"
        )
    rng = np.random.default_rng(seed)
    x, y = (np.asarray(rows, np.float64) for rows in (features_ND, others_MD))
    in_x, in_y = _halves(len(x), n_subsets, rng), _halves(len(y), n_subsets, rng)
    value, *halves = _mean_within(kernel, x, in_x) + _mean_within(kernel, y, in_y) - 2 * _mean(kernel, x, y, in_x, in_y)
    lo, hi = np.percentile(halves, [2.5, 97.5])
    return Estimate(float(value), float(lo), float(hi))


def _halves(n: int, n_subsets: int, rng: np.random.Generator) -> np.ndarray:
    """Which objects are in which subset, [n, 1 + R] of 0 and 1: first all of them, then random halves."""
    order_RN = rng.permuted(np.tile(np.arange(n), (n_subsets, 1)), axis=1)
    return np.concatenate([np.ones((n, 1)), (order_RN < n // 2).T], axis=1)


def _sums(kernel: Kernel, x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray) -> np.ndarray:
    """The kernel summed over all pairs of each subset, [R]."""
    return sum(
        np.einsum("br,br->r", in_x[start : start + BLOCK_ROWS], kernel(x[start : start + BLOCK_ROWS], y) @ in_y)
        for start in range(0, len(x), BLOCK_ROWS)
    )


def _mean(kernel: Kernel, x: np.ndarray, y: np.ndarray, in_x: np.ndarray, in_y: np.ndarray) -> np.ndarray:
    return _sums(kernel, x, y, in_x, in_y) / (in_x.sum(0) * in_y.sum(0))


def _mean_within(kernel: Kernel, x: np.ndarray, in_x: np.ndarray) -> np.ndarray:
    """The same over pairs of different objects."""
    with_itself_N = np.array([kernel(row[None], row[None])[0, 0] for row in x])
    count_R = in_x.sum(0)
    return (_sums(kernel, x, x, in_x, in_x) - with_itself_N @ in_x) / (count_R * (count_R - 1))


def _gaussian(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D], and a root R [D, D] of the covariance: R^T R."""
    features_ND = np.asarray(features_ND, np.float64)
    mean_D = features_ND.mean(axis=0)
    return mean_D, np.linalg.qr(features_ND - mean_D, mode="r") / np.sqrt(len(features_ND) - 1)


def _check(features_ND: np.ndarray, others_MD: np.ndarray) -> None:
    if features_ND.ndim != 2 or others_MD.ndim != 2 or features_ND.shape[1] != others_MD.shape[1]:
        raise ValueError(
            f"features must be matrices of one width, got {list(features_ND.shape)} and {list(others_MD.shape)}"
        )
    if not (np.isfinite(features_ND).all() and np.isfinite(others_MD).all()):
        raise ValueError("features hold a value that is not finite")


# -------------------------------------------------------------------------------------------------- of sets of points


def chamfer_matrix(clouds_KP3: np.ndarray, *, workers: int = 1, quiet: bool = True) -> np.ndarray:
    """Chamfer distance (`surfaces.py`: not squared, mean of both directions) of every two of K clouds, f64 [K, K].

    K trees are asked for K P points each, some at a time, so that memory is K^2 and not K^2 P.

    Args:
        workers: threads of the lookup.
        quiet: show no progress.
    """
    k, p, _ = clouds_KP3.shape
    points = clouds_KP3.reshape(-1, 3)
    step = max(1, QUERY_POINTS // p) * p
    to_nearest_KK = np.empty((k, k))  # mean distance from the points of the row's cloud to those of the column's
    with Bar(k, "comparing point sets", quiet=quiet) as bar:
        for column, cloud_P3 in enumerate(clouds_KP3):
            tree = cKDTree(cloud_P3)
            parts = [tree.query(points[i : i + step], workers=workers)[0] for i in range(0, len(points), step)]
            to_nearest_KK[:, column] = np.concatenate(parts).reshape(k, p).mean(axis=1)
            bar.update(1)
    return (to_nearest_KK + to_nearest_KK.T) / 2


def point_set_scores(distances_KK: np.ndarray, generated: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Coverage, minimum matching distance and 1-nearest-neighbour accuracy (Achlioptas et al. 2018; Yang et al. 2019,
    PointFlow) of two sets out of K objects.

    COV: the share of references that are the nearest reference of at least one generated object; higher is better.
    MMD: the mean over references of the distance to the nearest generated object, in object units; lower is better.
        (PointFlow's is of squared distances, summed over both directions.)
    1-NNA: the share of objects whose nearest other object is of their own side. Best is 50 %; above, the sides can be
        told apart; below, generated objects stick to single references, and copies of them have 0. Tied neighbours
        share the credit.

    Args:
        distances_KK: symmetric, of all objects.
        generated, references: indices into it; no object in both.
    Raises: UserError for fewer than 20 objects on a side, or unequal numbers.
    """
    if min(len(generated), len(references)) < LEAST_SETS:
        raise UserError(
            f"COV, MMD and 1-NNA need at least {LEAST_SETS} objects on either side, "
            f"there are {len(generated)} and {len(references)}"
        )
    if len(generated) != len(references):
        raise UserError(
            f"COV, MMD and 1-NNA need the same number of objects on both sides, "
            f"there are {len(generated)} and {len(references)}"
        )
    to_reference_GR = distances_KK[np.ix_(generated, references)]
    both = np.concatenate([generated, references])
    distances_UU = distances_KK[np.ix_(both, both)].copy()
    np.fill_diagonal(distances_UU, np.inf)
    own_U = np.arange(len(both)) < len(generated)
    nearest_UU = distances_UU == distances_UU.min(axis=1, keepdims=True)
    same_UU = own_U[:, None] == own_U
    return {
        "cov": len(np.unique(to_reference_GR.argmin(axis=1))) / len(references),
        "mmd": float(to_reference_GR.min(axis=0).mean()),
        "1-nna": float(((nearest_UU & same_UU).sum(1) / nearest_UU.sum(1)).mean()),
    }
