"""What is odd about a mesh: holes, flipped faces, loose parts, floors, sizes, and views that show next to nothing.

Each finding is one sentence among an asset's warnings; it rejects the file only where `JudgeSettings.reject` says so.
All is measured in the normalised object frame, after corners in the same place are joined.

How often each kind is found on 1,898 game props that people made as single objects: open 8 %, flipped 0.7 %,
degenerate 0.8 %, apart 0.5 % (sheaves of crops, a gate of two posts), empty 0.1 % (a spear, a fishing rod); parts,
floor, scale and texture never. With a plane of twice their size below them, 135 of 150 are found to stand on one; the
other 15 are flatter than `RISES`.
Shapes: V vertices, F faces, E edges, C connected parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .limits import ANIMATED
from .mesh import NORMALISED_SIDE, Mesh
from .sampling import Solid

__all__ = ["KINDS", "JudgeSettings", "Measures", "findings", "measure"]

Kind = Literal[
    "open", "degenerate", "flipped", "parts", "apart", "floor", "scale", "empty", "texture", "animated", "duplicate"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

DEGENERATE = 1e-6  # a face whose height over its longest edge is less than this part of that edge
GROUPED = 512  # parts compared with each other for the gaps between them, the largest by area
FLAT = 0.02  # height of a floor, as a part of the object's longest side
SPANS = 0.9  # of the object's width and depth, what a floor takes up at least
RISES = 0.1  # what stands on a floor, likewise at least
MOST_ABOVE = 0.7  # of a floor's area, what the box of all that stands on it covers at most
# Volume over area^1.5 (a sphere: 0.094) below which a surface has no inside: closed ones, and open ones such as leaves.
NO_VOLUME = (1e-6, 0.01)


class JudgeSettings(BaseModel):
    """From where on something is worth a warning. Shares are in [0, 1]; a share of 1 switches a check off.

    Of the kinds that `reject` may name, "animated" has no threshold, and "duplicate" is no matter of one file alone:
    what compares all of them (duplicates.py) decides it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    open_edges: float = Field(default=0.2, ge=0, le=1, description="open: share of edges that only one face has")
    degenerate_faces: float = Field(default=0.1, ge=0, le=1, description="degenerate: share of faces without area")
    flipped_faces: float = Field(default=0.1, ge=0, le=1, description="flipped: share of faces wound the wrong way")
    parts: int = Field(default=200, ge=1, description="parts: connected parts")
    gap: float = Field(default=0.2, ge=0, description="apart: between groups of parts, in the object's longest sides")
    group_share: float = Field(default=0.05, ge=0, le=1, description="apart: of the area, for a group to count as one")
    floor: bool = Field(default=True, description="floor: look for a flat part under all the rest")
    smallest: float = Field(default=1e-3, ge=0, description="scale: longest side in the file's units (glTF: metres)")
    largest: float = Field(default=1e4, gt=0, description="scale: longest side in the file's units")
    seen: float = Field(default=0.005, ge=0, le=1, description="empty: share of the views' pixels that it covers")
    texture_side: int = Field(default=4096, ge=1, description="texture: longest side of a texture, in pixels")
    texture_pixels: int = Field(default=1 << 25, ge=1, description="texture: pixels of all its textures together")
    reject: tuple[Kind, ...] = Field(default=(), description=f"kinds that reject a file: {', '.join(KINDS)}")

    @field_validator("reject", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        """A kind alone, and nothing, are what a command line easily says."""
        if value is None or isinstance(value, str):
            return (value,) if value else ()
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Measures:
    """Numbers about one mesh; they go into the json member's "mesh".

    open_edge_share: of the distinct edges, those of one face alone; 0 for a watertight mesh.
    degenerate_share: of the faces, those without area.
    flipped_share: of the other faces, those wound the wrong way by their neighbours (`flipped_faces`) that are also
        seen from behind more often than from the front (either alone errs, on cavities and on sheets) and that are not
        there a second time with the other winding.
    components: parts connected by shared vertices.
    groups: of parts closer than `gap`, see `part_groups`.
    floor: whether one part is a floor, see `has_floor`.
    longest_side: in the file's units.
    seen_share: mean alpha of all views; None without views.
    textures, texture_side, texture_pixels: how many images, the longest side of the largest, and the pixels of all;
        0 without.
    """

    open_edge_share: float
    degenerate_share: float
    flipped_share: float
    components: int
    groups: int
    floor: bool
    longest_side: float
    seen_share: float | None
    textures: int
    texture_side: int
    texture_pixels: int

    def to_json(self) -> dict[str, Any]:
        """Shares rounded to 4 digits, so that the last bit of a library does not change a shard."""
        return {key: round(v, 4) if key.endswith("_share") and v is not None else v for key, v in asdict(self).items()}


def measure(
    mesh: Mesh, solid: Solid, back: np.ndarray, alpha: np.ndarray | None, settings: JudgeSettings | None = None
) -> Measures:
    """Measure one asset.

    Args:
        mesh: in the normalised frame, as read.
        solid: made of it. Its mesh has equal vertices joined, equal faces once, and none without area.
        back: [4, 4] from the normalised frame to the file's.
        alpha: uint8 [V, H, W] of the views, or None.
    """
    settings, joined = settings or JudgeSettings(), solid.mesh
    part_F = parts(joined)
    seen_from_behind_F = np.einsum("fc,fc->f", solid.fronts, joined.face_normals) < 0
    flipped_F = flipped_faces(joined) & seen_from_behind_F
    if flipped_F.any():
        flipped_F &= ~two_sided(joined, mesh)
    images = {id(m.texture): m.texture.shape for m in mesh.materials if m.texture is not None}
    return Measures(
        open_edge_share=open_edge_share(joined),
        degenerate_share=degenerate_share(mesh),
        flipped_share=float(np.mean(flipped_F)),
        components=int(part_F.max()) + 1,
        groups=part_groups(joined, part_F, settings.gap, settings.group_share),
        floor=has_floor(joined, part_F),
        longest_side=float(f"{back[0, 0] * NORMALISED_SIDE:.6g}"),
        seen_share=None if alpha is None else float(alpha.sum() / (255 * alpha.size)),
        textures=len(images),
        texture_side=max((max(shape[:2]) for shape in images.values()), default=0),
        texture_pixels=sum(shape[0] * shape[1] for shape in images.values()),
    )


def findings(m: Measures, s: JudgeSettings, told: Sequence[str] = ()) -> dict[Kind, str]:
    """What is odd, one sentence a kind; never "duplicate".

    Args:
        told: what the reader warned of. Its sentence on an animation is that of the kind "animated", word for word.
    """
    found: dict[Kind, str] = {}
    if m.open_edge_share > s.open_edges:
        found["open"] = f"it is not watertight: {m.open_edge_share:.0%} of its edges are open"
    if m.degenerate_share > s.degenerate_faces:
        found["degenerate"] = f"it has faces without area: {m.degenerate_share:.0%} of all"
    if m.flipped_share > s.flipped_faces:
        found["flipped"] = f"it has faces wound the wrong way: {m.flipped_share:.0%} of all"
    if m.components > s.parts:
        found["parts"] = f"it has {m.components} unconnected parts"
    if m.groups > 1:
        found["apart"] = f"it is not one object: its parts form {m.groups} groups that lie far apart"
    if m.floor and s.floor:
        found["floor"] = "it stands on a floor that takes up nearly its whole footprint"
    if not s.smallest <= m.longest_side <= s.largest:
        found["scale"] = f"its longest side is {m.longest_side:.3g} units: its scale is hardly right"
    if m.seen_share is not None and m.seen_share < s.seen:
        found["empty"] = f"its views are nearly empty: it covers {m.seen_share:.1%} of them"
    if m.texture_side > s.texture_side:
        found["texture"] = f"it has a texture of {m.texture_side} pixels along a side"
    elif m.texture_pixels > s.texture_pixels:
        found["texture"] = f"its textures have {m.texture_pixels / 1e6:.0f} million pixels together"
    if animated := next((sentence for sentence in told if sentence == ANIMATED), None):
        found["animated"] = animated
    return found


# ------------------------------------------------------------------------------------------------------ the measures


def degenerate_share(mesh: Mesh) -> float:
    """Share of faces whose height over the longest edge is below `DEGENERATE` of that edge, or that are a point."""
    edges_F33 = mesh.triangles - np.roll(mesh.triangles, 1, axis=1)
    longest_squared_F = np.square(edges_F33, dtype=np.float64).sum(axis=2).max(axis=1)
    return float(np.mean(2 * mesh.face_areas <= DEGENERATE * longest_squared_F))


def open_edge_share(joined: Mesh) -> float:
    """Share of distinct edges that only one face has. Example: a box without one of its six sides has 4 of 17."""
    faces_E = np.unique(_edges(joined)[0], return_counts=True)[1]
    return float(np.mean(faces_E == 1))


def parts(joined: Mesh) -> np.ndarray:
    """[F] number of the part of faces connected by vertices, counted from 0."""
    part_F = _connected(joined.faces[:, [0, 1]].ravel(), joined.faces[:, [1, 2]].ravel(), len(joined.vertices))
    return np.unique(part_F[joined.faces[:, 0]], return_inverse=True)[1]


def flipped_faces(joined: Mesh) -> np.ndarray:
    """[F] bool: faces wound the wrong way.

    Faces that share an edge agree if they run along it in opposite directions; from that follow two sides for each
    connected piece of the surface. The right one gives the piece a positive volume about its centre, or, where it has
    hardly a volume (a plane, a leaf), the larger part of its area. A piece that cannot be oriented (Möbius) counts as
    right. The wall of a cavity counts as flipped: only what is seen of it tells that it is not.
    """
    n = len(joined.faces)
    key_3F, forward_3F = _edges(joined)
    order = np.argsort(key_3F, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(key_3F[order]) != 0])
    faces_E = np.diff(np.r_[starts, len(order)])
    pairs = starts[faces_E == 2]  # edges of more faces tell nothing
    first, second = order[pairs], order[pairs + 1]
    differ = (forward_3F[first] == forward_3F[second]) * n
    a, b = first % n, second % n
    # Each face twice, as it is and turned; faces that agree are linked as they are, others crosswise.
    label = _connected(np.r_[a, a + n], np.r_[b + differ, (b + n + differ) % (2 * n)], 2 * n)
    as_is_F, turned_F = label[:n], label[n:]
    piece_F = np.unique(np.minimum(as_is_F, turned_F), return_inverse=True)[1]
    sign_F = np.where(as_is_F <= turned_F, 1.0, -1.0)  # towards one side of the piece

    open_F = np.zeros(n, bool)
    open_F[order[starts[faces_E == 1]] % n] = True
    is_open_P = np.bincount(piece_F, open_F) > 0

    area_F = joined.face_areas
    corners_F33 = joined.triangles.astype(np.float64)
    area_P = np.bincount(piece_F, area_F)
    centre_P3 = np.stack([np.bincount(piece_F, area_F * c) for c in corners_F33.mean(axis=1).T], 1) / area_P[:, None]
    a_F3, b_F3, c_F3 = np.moveaxis(corners_F33 - centre_P3[piece_F][:, None], 1, 0)
    volume_P = np.bincount(piece_F, sign_F * np.einsum("fi,fi->f", a_F3, np.cross(b_F3, c_F3)) / 6)
    majority_P = np.bincount(piece_F, sign_F * area_F)

    has_volume_P = np.abs(volume_P) >= np.where(is_open_P, *NO_VOLUME[::-1]) * area_P**1.5
    right_P = np.where(np.where(has_volume_P, volume_P, majority_P) < 0, -1.0, 1.0)
    return (sign_F != right_P[piece_F]) & (as_is_F != turned_F)


def two_sided(joined: Mesh, mesh: Mesh) -> np.ndarray:
    """[F] bool: faces of `joined` that `mesh`, of which it was made, has with both windings."""
    count = len(joined.vertices)
    place_V = np.unique(np.concatenate([joined.vertices, mesh.vertices]), axis=0, return_inverse=True)[1].ravel()
    faces = np.concatenate([place_V[joined.faces], place_V[count:][mesh.faces]])
    face_N = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True)[1].ravel()
    smallest_N1 = faces.argmin(axis=1)[:, None]
    second_N1, third_N1 = (np.take_along_axis(faces, (smallest_N1 + k) % 3, axis=1) for k in (1, 2))
    upwards_N = (second_N1 < third_N1)[:, 0]
    return ((np.bincount(face_N, upwards_N) > 0) & (np.bincount(face_N, ~upwards_N) > 0))[face_N[: len(joined.faces)]]


def part_groups(joined: Mesh, part_F: np.ndarray, gap: float, share: float) -> int:
    """How many groups of parts there are whose boxes are further apart than `gap` longest sides of the object.

    Args:
        share: groups of less than this share of the area are not counted; nor are parts beyond the `GROUPED` largest.
    Example: two unit boxes whose centres are 3 apart: a gap of 2 in a longest side of 4, so two groups for gap < 0.5.
    """
    area_C = np.bincount(part_F, joined.face_areas)
    low_C3, high_C3 = _boxes(joined, part_F)
    side = (high_C3.max(axis=0) - low_C3.min(axis=0)).max()
    kept = np.argsort(-area_C, kind="stable")[:GROUPED]
    low_C3, high_C3 = low_C3[kept], high_C3[kept]
    between_CC3 = np.maximum(0, np.maximum(low_C3[:, None] - high_C3, low_C3 - high_C3[:, None]))
    near_a, near_b = np.nonzero(np.linalg.norm(between_CC3, axis=2) <= gap * side)
    group_C = _connected(near_a, near_b, len(kept))
    return int((np.bincount(group_C, area_C[kept]) >= share * area_C.sum()).sum())


def has_floor(joined: Mesh, part_F: np.ndarray) -> bool:
    """Whether a flat part at the very bottom spans the object's footprint, and something narrower stands on it.

    The bottom is at -Y, or at -Z as in OBJ, PLY and STL files of programmes that have +Z up: nothing in these says
    which. In a file with +Y up, that finds a wall behind the object.
    """
    low_C3, high_C3 = _boxes(joined, part_F)
    low_3, high_3 = low_C3.min(axis=0), high_C3.max(axis=0)
    return any(_floor_along(axis, low_C3, high_C3, low_3, high_3) for axis in (1, 2))


def _floor_along(axis: int, low_C3: np.ndarray, high_C3: np.ndarray, low_3: np.ndarray, high_3: np.ndarray) -> bool:
    """As `has_floor`, at the lower end of an axis, given the boxes of the parts and of the whole."""
    side, ground = (high_3 - low_3).max(), [other for other in range(3) if other != axis]
    flat = high_C3[:, axis] - low_3[axis] <= FLAT * side
    spans = ((high_C3 - low_C3)[:, ground] >= SPANS * (high_3 - low_3)[ground]).all(axis=1)
    floor = flat & spans
    if not floor.any() or floor.all() or high_3[axis] - low_3[axis] < RISES * side:
        return False
    above_2 = high_C3[~floor].max(axis=0)[ground] - low_C3[~floor].min(axis=0)[ground]
    return bool(above_2.prod() <= MOST_ABOVE * (high_3 - low_3)[ground].prod())


def _edges(joined: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """For the 3 F sides of faces, all first sides first: a number int64 that equal edges share, and bool whether the
    face runs along it upwards."""
    start, end = joined.faces.T.ravel().astype(np.int64), np.roll(joined.faces, -1, axis=1).T.ravel().astype(np.int64)
    return np.minimum(start, end) * len(joined.vertices) + np.maximum(start, end), start < end


def _boxes(joined: Mesh, part_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corners [C, 3] of the parts."""
    order = np.argsort(part_F, kind="stable")
    starts = np.searchsorted(part_F[order], np.arange(part_F.max() + 1))
    triangles = joined.triangles[order]
    low_C3 = np.minimum.reduceat(triangles.min(axis=1), starts).astype(np.float64)
    return low_C3, np.maximum.reduceat(triangles.max(axis=1), starts).astype(np.float64)


def _connected(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """[n] component of each of n nodes, given the ends of links."""
    return connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)[1]
