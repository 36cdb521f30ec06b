"""How near two surfaces, or two solids, are to each other: Chamfer distance, F-score, normal consistency, IoU.

Distances are unsquared and in object units (a normalised object's longest side is 1.8). The Chamfer distance is the
mean of the two mean distances from each point of one set to the nearest of the other. (PyTorch3D and Point-E square
the distances and add the two means; some papers print 1000 times that. Such numbers do not compare.) The F-score at a
threshold t is the harmonic mean of precision and recall, the shares of either set that lie within t of the other.
Nothing is aligned here: whoever calls says how that was done.

Two samplings of one surface are not the same points, so a perfect copy has a floor: the mean distance from a point to
the nearest of N others spread at random over an area A is sqrt(A / N) / 2, and the share within t is
1 - exp(-pi N t^2 / A). On a cube of side 1.8 with 4,096 points that is .035, and the F-score at .02 is .23; with 65,536
they are .0086 and .986. A threshold below the floor measures the sampling.

This module imports no torch on its own: it is also what the processes load that compare files.

Shapes: N points of one set, M of the other, P points of space, F faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from ...data_pipes.mesh import Mesh
from ...data_pipes.sampling import Solid

if TYPE_CHECKING:
    from ...models.decoder import ImplicitField  # it imports torch

__all__ = [
    "THRESHOLDS",
    "chamfer_and_f_scores",
    "iou",
    "mesh_iou",
    "normal_consistency",
    "points_on",
    "surface_scores",
]

THRESHOLDS = (0.02, 0.05)  # of the F-scores, in object units: 1.1 % and 2.8 % of the longest side
IOU_POINTS = 1 << 16


def surface_scores(
    points_N3: np.ndarray,
    normals_N3: np.ndarray,
    others_M3: np.ndarray,
    other_normals_M3: np.ndarray,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, float]:
    """All that is measured between two surfaces by points with unit normals: "chamfer", "f@THRESHOLD" of each
    threshold, "normal_consistency"."""
    (there_N, index_N), (back_M, index_M) = _nearest(points_N3, others_M3)
    chamfer, f_scores = _chamfer_and_f_scores(there_N, back_M, thresholds)
    return {
        "chamfer": chamfer,
        **{f"f@{threshold}": score for threshold, score in zip(thresholds, f_scores, strict=True)},
        "normal_consistency": _normal_consistency(normals_N3, other_normals_M3, index_N, index_M),
    }


def chamfer_and_f_scores(
    points_N3: np.ndarray, others_M3: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[float, list[float]]:
    """Chamfer distance and an F-score per threshold of two sets of points (definitions: the head of this file).

    Example: two equal sets shifted by d, less than half their spacing, have Chamfer d.
    """
    (there_N, _), (back_M, _) = _nearest(points_N3, others_M3)
    return _chamfer_and_f_scores(there_N, back_M, thresholds)


def normal_consistency(
    points_N3: np.ndarray, normals_N3: np.ndarray, others_M3: np.ndarray, other_normals_M3: np.ndarray
) -> float:
    """Mean absolute cosine between the normal of each point and that of the nearest one of the other set, in [0, 1];
    the mean of both directions (Mescheder et al. 2019, Occupancy Networks).

    Absolute, because files disagree on which side of a face is its front. Unrelated directions have 1/2.

    Args:
        normals_N3, other_normals_M3: of unit length.
    Example: two parallel planes have 1, two that meet at 60 degrees 1/2.
    """
    (_, index_N), (_, index_M) = _nearest(points_N3, others_M3)
    return _normal_consistency(normals_N3, other_normals_M3, index_N, index_M)


def _nearest(points_N3: np.ndarray, others_M3: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distance and index of each point's nearest one of the other set, there and back."""
    return [cKDTree(b).query(a) for a, b in ((points_N3, others_M3), (others_M3, points_N3))]


def _chamfer_and_f_scores(
    there_N: np.ndarray, back_M: np.ndarray, thresholds: Sequence[float]
) -> tuple[float, list[float]]:
    scores = []
    for threshold in thresholds:
        precision, recall = (there_N <= threshold).mean(), (back_M <= threshold).mean()
        scores.append(float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0)
    return float((there_N.mean() + back_M.mean()) / 2), scores


def _normal_consistency(
    normals_N3: np.ndarray, other_normals_M3: np.ndarray, index_N: np.ndarray, index_M: np.ndarray
) -> float:
    pairs = (normals_N3, other_normals_M3[index_N]), (other_normals_M3, normals_N3[index_M])
    there, back = (np.abs(np.einsum("nc,nc->n", a, b)).mean() for a, b in pairs)
    return float((there + back) / 2)


def points_on(triangles_F33: np.ndarray, n_points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points drawn uniformly by area from triangles, and the unit normals there: [N, 3] each.

    All surfaces count, inner ones too.

    Raises: ValueError for triangles without area.
    """
    origin_F3, u_F3, v_F3 = triangles_F33[:, 0], *(triangles_F33[:, k] - triangles_F33[:, 0] for k in (1, 2))
    cross_F3 = np.cross(u_F3, v_F3).astype(np.float64)
    areas_F = np.linalg.norm(cross_F3, axis=1)
    if not areas_F.sum() > 0:
        raise ValueError("triangles without area have no surface to sample")
    face_N = rng.choice(len(areas_F), size=n_points, p=areas_F / areas_F.sum())
    a_N1, b_N1 = rng.random((2, n_points, 1))
    a_N1, b_N1 = np.where(a_N1 + b_N1 > 1, (1 - a_N1, 1 - b_N1), (a_N1, b_N1))  # the far half of the square, folded
    points_N3 = origin_F3[face_N] + a_N1 * u_F3[face_N] + b_N1 * v_F3[face_N]
    return points_N3, cross_F3[face_N] / areas_F[face_N, None]


def iou(field: ImplicitField, points_P3: np.ndarray, sdf_P: np.ndarray) -> float:
    """Intersection over union of the insides of a field of one object and the truth; 1 where both are empty.

    Args:
        sdf_P: the truth's signed distances at the points, negative inside.
    """
    import torch

    points_1P3 = torch.from_numpy(np.ascontiguousarray(points_P3, np.float32))[None].to(field.device)
    inside_P = field(points_1P3).sdf_BP[0].cpu().numpy() < 0
    union = (inside_P | (sdf_P < 0)).sum()
    return float((inside_P & (sdf_P < 0)).sum() / union) if union else 1.0


def mesh_iou(shape: Mesh | Solid, other: Mesh | Solid, *, n_points: int = IOU_POINTS, seed: int = 0) -> float:
    """Intersection over union of two solids' volumes; NaN where neither has an inside.

    What is inside is voted by rays (`data_pipes.sampling`), so meshes may be open, overlap or be flipped; a single
    sheet has no inside. The points are uniform in the box around both, which holds all that counts: the same number as
    from points in [-1, 1]^3 for normalised objects, with less noise. Of a box filled to the share s by the union, the
    standard error is sqrt(iou (1 - iou) / (s n_points)).

    Args:
        shape, other: meshes in the normalised object frame, or the `Solid`s made of them.
    Example: two unit cubes shifted by 1/2 along one axis have 1/3.
    """
    solid, other_solid = (one if isinstance(one, Solid) else Solid(one) for one in (shape, other))
    lower_3, upper_3 = zip(solid.mesh.bounds(), other_solid.mesh.bounds(), strict=True)
    rng = np.random.default_rng(seed)
    points_P3 = rng.uniform(np.minimum(*lower_3), np.maximum(*upper_3), (n_points, 3)).astype(np.float32)
    inside_P, other_inside_P = solid.inside(points_P3), other_solid.inside(points_P3)
    union = (inside_P | other_inside_P).sum()
    return float((inside_P & other_inside_P).sum() / union) if union else float("nan")
