"""Which side of each face is its front: the one seen more often from far away, whatever the winding in the file.

Faces that share an edge are turned alike first, and a piece of surface of such faces is seen as one: what is seen of
a face through a hole, from the wrong side, is outvoted. Pieces that nobody sees follow the part, connected by vertices,
that they belong to, in the file's winding. A piece that cannot be turned alike (Moebius) is judged face by face.
Shapes: F faces, D samples.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .edges import Edges
from .mesh import Mesh
from .render import RayScene

__all__ = ["find_fronts"]

RAYS = 4  # per sample


def find_fronts(joined: Mesh, xyz_D3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[F, 3] float32 normals turned to the front.

    Args:
        joined: with corners in the same place joined, and no faces without area.
        xyz_D3: float32 points on it, at which it is looked from random directions.
    """
    scene = RayScene(joined)
    far = np.float32(4 * max(1.0, float(np.abs(xyz_D3).max())))
    votes_F = np.zeros(len(joined.faces))
    for _ in range(RAYS):
        direction_D3 = rng.standard_normal(xyz_D3.shape, np.float32)
        direction_D3 /= np.sqrt(np.einsum("dc,dc->d", direction_D3, direction_D3))[:, None]
        hits = scene.cast(xyz_D3 - far * direction_D3, direction_D3)
        cosine_M = np.einsum("mc,mc->m", joined.face_normals[hits.face_M], direction_D3[hits.ray_M])
        votes_F -= np.bincount(hits.face_M, np.sign(cosine_M), len(votes_F))

    piece_F, sign_F = _pieces(joined)
    piece_votes_F = sign_F * np.bincount(piece_F, sign_F * votes_F)[piece_F]
    part_F = _parts(joined)
    part_votes_F = np.bincount(part_F, piece_votes_F)[part_F]
    turn_F = np.where(piece_votes_F != 0, piece_votes_F, part_votes_F) < 0
    return np.where(turn_F[:, None], -joined.face_normals, joined.face_normals)


def _pieces(joined: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The number [F] of each face's piece, and 1 or -1 [F], by which all faces of a piece are turned alike."""
    n = len(joined.faces)
    edges = Edges.of(joined)
    one, other = edges.faces_E2.T
    across = np.where(edges.agree_E, 0, n)
    # Each face twice, as it is and turned; faces that agree are linked as they are, others crosswise.
    label = _connected(np.r_[one, one + n], np.r_[other + across, (other + n + across) % (2 * n)], 2 * n)
    as_is_F, turned_F = label[:n], label[n:]
    alone_F = as_is_F == turned_F
    piece_F = np.where(alone_F, 2 * n + np.arange(n), np.minimum(as_is_F, turned_F))
    return np.unique(piece_F, return_inverse=True)[1], np.where(as_is_F <= turned_F, 1, -1)


def _parts(joined: Mesh) -> np.ndarray:
    """[F] the number of the connected part that each face belongs to."""
    a, b = joined.faces[:, [0, 1]].ravel(), joined.faces[:, [1, 2]].ravel()
    return _connected(a, b, len(joined.vertices))[joined.faces[:, 0]]


def _connected(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """[n] component of each of n nodes, given the ends of links."""
    return connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)[1]
