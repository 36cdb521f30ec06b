"""Where a mesh has sharp edges, and points along them: what a surface sampled by area shows least of its shape.

Sharp are edges whose two faces make an angle of `SHARP_DEGREES` or more (as Dora's sharp edge sampling, Chen et al.
2024), edges of one face alone, and those of three or more.
Shapes: F faces, E edges, N points.
"""

from __future__ import annotations

import numpy as np

from .mesh import Mesh

__all__ = ["SHARP_DEGREES", "points_along", "sharp_edges"]

SHARP_DEGREES = 30.0  # between the normals of the two faces: 0 where they lie in a plane


def sharp_edges(joined: Mesh) -> np.ndarray:
    """[E, 2, 3] float64 ends of the sharp edges. Faces may be wound either way.

    Args:
        joined: with corners in the same place joined, and no faces without area.
    Example: a cube has 12, a sphere of many faces none.
    """
    n_faces = len(joined.faces)
    start, end = joined.faces.T.ravel().astype(np.int64), np.roll(joined.faces, -1, axis=1).T.ravel().astype(np.int64)
    key = np.minimum(start, end) * len(joined.vertices) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    first_E = np.flatnonzero(np.diff(key[order], prepend=-1))
    faces_E = np.diff(first_E, append=len(order))
    sharp_E = faces_E != 2
    one, other = order[first_E[~sharp_E]], order[first_E[~sharp_E] + 1]
    cosine = np.einsum("ec,ec->e", joined.face_normals[one % n_faces], joined.face_normals[other % n_faces])
    # Faces wound alike run along their edge in opposite directions.
    cosine *= np.where(start[one] == start[other], -1, 1)
    sharp_E[~sharp_E] = cosine <= np.cos(np.radians(SHARP_DEGREES)) + 1e-6
    side = order[first_E[sharp_E]]
    return joined.vertices[np.stack([start[side], end[side]], axis=1)].astype(np.float64)


def points_along(ends_E23: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 3] float64 points on edges, uniform by length, in random order. There must be an edge."""
    cumulative_E = np.cumsum(np.linalg.norm(ends_E23[:, 1] - ends_E23[:, 0], axis=1))
    edge_N = np.searchsorted(cumulative_E, rng.random(n) * cumulative_E[-1], side="right")
    along_N1 = rng.random((n, 1))
    ends_N23 = ends_E23[np.minimum(edge_N, len(ends_E23) - 1)]
    return (1 - along_N1) * ends_N23[:, 0] + along_N1 * ends_N23[:, 1]
