"""A mesh's edges: which faces meet there, where they are sharp, and points along those.

Sharp are edges whose two faces make an angle of `SHARP_DEGREES` or more (as Dora's sharp edge sampling, Chen et al.
2024), edges of one face alone, and those of three or more. What is sampled by area alone shows least of a shape there.
Shapes: F faces, E edges, N points. Meshes here have corners in the same place joined, and no faces without area.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .mesh import Mesh

__all__ = ["SHARP_DEGREES", "Edges", "points_along", "sharp_edges"]

SHARP_DEGREES = 30.0  # between the normals of the two faces: 0 where they lie in a plane


@dataclass(frozen=True)
class Edges:
    """Args:
    single_ends_E2: int64, vertices at the ends of edges that have not just two faces.
    ends_E2, faces_E2: int64, of the other edges, and their two faces.
    agree_E: bool, whether those two are wound alike.
    """

    single_ends_E2: np.ndarray
    ends_E2: np.ndarray
    faces_E2: np.ndarray
    agree_E: np.ndarray

    @classmethod
    def of(cls, joined: Mesh) -> Edges:
        n_faces = len(joined.faces)
        start = joined.faces.T.ravel().astype(np.int64)
        end = np.roll(joined.faces, -1, axis=1).T.ravel().astype(np.int64)
        key = np.minimum(start, end) * len(joined.vertices) + np.maximum(start, end)
        order = np.argsort(key, kind="stable")
        first_E = np.flatnonzero(np.diff(key[order], prepend=-1))
        two_E = np.diff(first_E, append=len(order)) == 2
        single, one, other = order[first_E[~two_E]], order[first_E[two_E]], order[first_E[two_E] + 1]
        return cls(
            np.stack([start[single], end[single]], axis=1),
            np.stack([start[one], end[one]], axis=1),
            np.stack([one, other], axis=1) % n_faces,
            start[one] != start[other],  # they run along the edge in opposite directions
        )


def sharp_edges(joined: Mesh) -> np.ndarray:
    """[E, 2, 3] float64 ends of the sharp edges. Faces may be wound either way.

    Example: a cube has 12, a sphere of many faces none.
    """
    edges = Edges.of(joined)
    normals_E23 = joined.face_normals[edges.faces_E2]
    cosine_E = np.einsum("ec,ec->e", normals_E23[:, 0], normals_E23[:, 1]) * np.where(edges.agree_E, 1, -1)
    sharp_E = cosine_E <= np.cos(np.radians(SHARP_DEGREES)) + 1e-6
    return joined.vertices[np.concatenate([edges.single_ends_E2, edges.ends_E2[sharp_E]])].astype(np.float64)


def points_along(ends_E23: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 3] float64 points on edges, uniform by length, in random order. There must be an edge."""
    cumulative_E = np.cumsum(np.linalg.norm(ends_E23[:, 1] - ends_E23[:, 0], axis=1))
    edge_N = np.searchsorted(cumulative_E, rng.random(n) * cumulative_E[-1], side="right")
    along_N1 = rng.random((n, 1))
    ends_N23 = ends_E23[np.minimum(edge_N, len(ends_E23) - 1)]
    return (1 - along_N1) * ends_N23[:, 0] + along_N1 * ends_N23[:, 1]
