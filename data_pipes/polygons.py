"""Polygons to triangles."""

from __future__ import annotations

import numpy as np

__all__ = ["fans"]


def fans(count_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Triangles of polygons whose corners are numbered through, polygon after polygon.

    Triangle k of a polygon is its first corner and the k-th pair of neighbours after it: right for convex ones, and
    for those that their first corner sees the whole of.

    Args:
        count_P: corners of each polygon; those with fewer than three have no triangle.
    Returns: the corners int64 [F, 3] of each triangle, and which polygon [F] it is of.
    """
    first_P = np.cumsum(count_P) - count_P
    triangles_P = np.maximum(count_P - 2, 0)
    polygon_F = np.repeat(np.arange(len(count_P)), triangles_P)
    k_F = np.arange(triangles_P.sum()) - np.repeat(np.cumsum(triangles_P) - triangles_P, triangles_P)
    first_F = first_P[polygon_F]
    return np.stack([first_F, first_F + k_F + 1, first_F + k_F + 2], axis=1), polygon_F
