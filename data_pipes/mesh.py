"""Coloured triangle meshes: what every 3D file becomes, and what is sampled and rendered.

Frame: glTF's, right-handed, +Y up, an object's front looks along +Z.
Texture coordinates: glTF's, (0, 0) is the upper left corner of the image and v grows downwards; textures repeat.
Colour: base colours and corner colours are kept in linear light, textures in sRGB. They are multiplied, filtered and
averaged in linear light; only results are encoded to sRGB.
Shapes: V vertices, F faces, N queried points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

__all__ = ["Material", "Mesh", "linear_to_srgb", "merge", "srgb_to_linear"]

AlphaMode = Literal["OPAQUE", "MASK", "BLEND"]
NORMALISED_SIDE = 1.8


def srgb_to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] (or uint8) to linear light, float32 (IEC 61966-2-1)."""
    if srgb.dtype == np.uint8:
        return _LINEAR_OF_BYTE[srgb]
    srgb = np.clip(srgb, 0, 1).astype(np.float32, copy=False)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32, copy=False)


def linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB in [0, 1], float32; values outside [0, 1] are clipped."""
    linear = np.clip(linear, 0, 1).astype(np.float32, copy=False)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055).astype(
        np.float32, copy=False
    )


_LINEAR_OF_BYTE = srgb_to_linear(np.arange(256, dtype=np.float32) / 255)


@dataclass(frozen=True)
class Material:
    """How a face is coloured; glTF's metallic-roughness base colour and nothing else.

    Args:
        base_color_linear: (4,) float32 RGBA in linear light, multiplies texture and corner colours.
        texture: uint8 [H, W, 4], sRGB with straight linear alpha, or None.
        alpha_mode: "OPAQUE" ignores alpha; "MASK" keeps what reaches `alpha_cutoff`; "BLEND" is see-through.
    """

    base_color_linear: np.ndarray
    texture: np.ndarray | None = None
    alpha_mode: AlphaMode = "OPAQUE"
    alpha_cutoff: float = 0.5

    def __post_init__(self) -> None:
        color_4 = np.asarray(self.base_color_linear, np.float32)
        if color_4.shape != (4,) or not np.isfinite(color_4).all():
            raise ValueError(f"base_color_linear must be 4 finite numbers, got {self.base_color_linear!r}")
        object.__setattr__(self, "base_color_linear", np.clip(color_4, 0, 1))
        if self.alpha_mode not in ("OPAQUE", "MASK", "BLEND"):
            raise ValueError(f"alpha_mode must be OPAQUE, MASK or BLEND, got {self.alpha_mode!r}")
        texture = self.texture
        if texture is not None and (texture.dtype != np.uint8 or texture.ndim != 3 or texture.shape[2] != 4):
            raise ValueError(f"texture must be uint8 [H, W, 4], got {texture.dtype} {list(texture.shape)}")
        if texture is not None and texture.size == 0:
            raise ValueError("texture must have at least one pixel")


WHITE = Material(np.ones(4))


@dataclass(frozen=True)
class Mesh:
    """Triangles with materials; corner attributes are per face, so seams need no split vertices.

    Args:
        vertices: float32 [V, 3], finite.
        faces: int32 [F, 3], indices into `vertices`; counter-clockwise seen from outside.
        face_material: int32 [F], indices into `materials`.
        corner_uv: float32 [F, 3, 2] or None.
        corner_rgba: float32 [F, 3, 4] in linear light or None.
    Raises: ValueError for wrong shapes, indices out of range or vertices that are not finite.
    """

    vertices: np.ndarray
    faces: np.ndarray
    face_material: np.ndarray
    materials: tuple[Material, ...]
    corner_uv: np.ndarray | None = None
    corner_rgba: np.ndarray | None = None

    def __post_init__(self) -> None:
        n_faces = len(self.faces)
        self._set("vertices", np.float32, (len(self.vertices), 3))
        self._set("faces", np.int32, (n_faces, 3))
        self._set("face_material", np.int32, (n_faces,))
        self._set("corner_uv", np.float32, (n_faces, 3, 2))
        self._set("corner_rgba", np.float32, (n_faces, 3, 4))
        if not np.isfinite(self.vertices).all():
            raise ValueError("vertices must be finite")
        for indices, limit, name in (
            (self.faces, len(self.vertices), "faces"),
            (self.face_material, len(self.materials), "face_material"),
        ):
            if indices.size and not (indices.min() >= 0 and indices.max() < limit):
                raise ValueError(f"{name} must lie in [0, {limit}), got [{indices.min()}, {indices.max()}]")

    def _set(self, name: str, dtype: type, shape: tuple[int, ...]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        array: np.ndarray = np.ascontiguousarray(value, dtype)
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
        object.__setattr__(self, name, array)

    @classmethod
    def from_vertex_colors(cls, vertices: np.ndarray, faces: np.ndarray, rgb_V3: np.ndarray) -> Mesh:
        """Colours at vertices, sRGB as floats in [0, 1] or uint8, interpolated in linear light."""
        return cls._from_corner_rgb(vertices, faces, srgb_to_linear(np.asarray(rgb_V3))[np.asarray(faces)])

    @classmethod
    def from_face_colors(cls, vertices: np.ndarray, faces: np.ndarray, rgb_F3: np.ndarray) -> Mesh:
        """One colour per face, sRGB as floats in [0, 1] or uint8."""
        rgb_F3 = srgb_to_linear(np.asarray(rgb_F3))
        return cls._from_corner_rgb(vertices, faces, np.repeat(rgb_F3[:, None], 3, axis=1))

    @classmethod
    def _from_corner_rgb(cls, vertices: np.ndarray, faces: np.ndarray, rgb_F33: np.ndarray) -> Mesh:
        rgba_F34 = np.concatenate([rgb_F33, np.ones((*rgb_F33.shape[:2], 1), np.float32)], axis=2)
        return cls(vertices, faces, np.zeros(len(faces), np.int32), (WHITE,), corner_rgba=rgba_F34)

    @cached_property
    def triangles(self) -> np.ndarray:
        """[F, 3, 3] float32 corner positions."""
        return self.vertices[self.faces]

    @cached_property
    def _cross_F3(self) -> np.ndarray:
        a, b, c = np.moveaxis(self.triangles.astype(np.float64), 1, 0)
        return np.cross(b - a, c - a)

    @cached_property
    def face_areas(self) -> np.ndarray:
        """[F] float64."""
        return np.linalg.norm(self._cross_F3, axis=1) / 2

    @cached_property
    def face_normals(self) -> np.ndarray:
        """[F, 3] float32 unit geometric normals; zero for faces without area."""
        length_F1 = np.linalg.norm(self._cross_F3, axis=1, keepdims=True)
        return np.divide(self._cross_F3, length_F1, out=np.zeros_like(self._cross_F3), where=length_F1 > 0).astype(
            np.float32
        )

    @cached_property
    def opaque(self) -> bool:
        """Nothing can be seen through any face."""
        return all(material.alpha_mode == "OPAQUE" for material in self.materials)

    def albedo(self, face_N: np.ndarray, barycentric_N3: np.ndarray) -> np.ndarray:
        """Surface colour at points of faces, unlit.

        Args:
            face_N: indices of faces.
            barycentric_N3: weights of the three corners, summing to 1.
        Returns: float32 [N, 4], sRGB with straight alpha (0 or 1 for OPAQUE and MASK), in [0, 1].
        """
        rgba_N4 = self.albedo_linear(face_N, barycentric_N3)
        rgba_N4[:, :3] = linear_to_srgb(rgba_N4[:, :3])
        return rgba_N4

    def albedo_linear(
        self, face_N: np.ndarray, barycentric_N3: np.ndarray, sides_N22: np.ndarray | None = None
    ) -> np.ndarray:
        """As `albedo`, in linear light.

        Args:
            sides_N22: two sides of a parallelogram around each point, as what the second and third barycentric grow
                along them. Textures are averaged over it, those of MASK materials excepted; without it they are looked
                up, bilinearly.
        """
        from .colour import albedo

        plain = sides_N22 is None
        return albedo(
            np.ascontiguousarray(face_N, np.int32),
            np.ascontiguousarray(barycentric_N3, np.float32),
            np.zeros((0, 2, 2), np.float32) if plain else np.ascontiguousarray(sides_N22, np.float32),
            self.face_material,
            np.zeros((0, 3, 2), np.float32) if self.corner_uv is None else self.corner_uv,
            np.zeros((0, 3, 4), np.float32) if self.corner_rgba is None else self.corner_rgba,
            *(self._palette if plain else self._filtered_palette),
        )

    @cached_property
    def _palette(self) -> tuple[np.ndarray, ...]:
        return _palette(self.materials, [[m.texture] for m in self.materials])

    @cached_property
    def _filtered_palette(self) -> tuple[np.ndarray, ...]:
        levels = {id(m.texture): _levels(m.texture) for m in self.materials}
        return _palette(self.materials, [levels[id(m.texture)] for m in self.materials])

    def transformed(self, matrix: np.ndarray) -> Mesh:
        """Moved by a 4x4 matrix acting on columns; a mirroring matrix turns the faces so that outside stays outside."""
        matrix = np.asarray(matrix, np.float64)
        moved = replace(self, vertices=self.vertices.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3])
        return moved._turned() if np.linalg.det(matrix[:3, :3]) < 0 else moved

    def _turned(self) -> Mesh:
        """The same faces with the opposite winding."""
        return replace(
            self,
            faces=self.faces[:, ::-1],
            corner_uv=None if self.corner_uv is None else self.corner_uv[:, ::-1],
            corner_rgba=None if self.corner_rgba is None else self.corner_rgba[:, ::-1],
        )

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (float64 [3] each) of the box around the faces; unused vertices do not count.

        Raises: ValueError for a mesh without faces.
        """
        if not len(self.faces):
            raise ValueError("a mesh without faces has no bounds")
        corners_N3 = self.vertices[np.unique(self.faces)].astype(np.float64)
        return corners_N3.min(axis=0), corners_N3.max(axis=0)

    def normalised(self) -> tuple[Mesh, np.ndarray]:
        """Bounding box centred on the origin, longest side 1.8.

        Returns: the mesh and the float64 [4, 4] matrix from the normalised back to the source's frame.
        Raises: ValueError if the mesh has no faces or no extent.
        """
        lower_3, upper_3 = self.bounds()
        side = (upper_3 - lower_3).max()
        if not side > 0:
            raise ValueError("a mesh whose vertices are all in one place cannot be normalised")
        centre_3, scale = (lower_3 + upper_3) / 2, side / NORMALISED_SIDE
        back = np.diag([scale, scale, scale, 1.0])
        back[:3, 3] = centre_3
        return replace(self, vertices=(self.vertices.astype(np.float64) - centre_3) / scale), back


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """All faces of several meshes as one; materials that are the same object are kept once.

    Raises: ValueError if there is no mesh.
    """
    if not meshes:
        raise ValueError("there are no meshes to merge")
    if len(meshes) == 1:
        return meshes[0]
    materials = list({id(material): material for mesh in meshes for material in mesh.materials}.values())
    index = {id(material): i for i, material in enumerate(materials)}
    offsets = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    face_material = [np.array([index[id(m)] for m in mesh.materials], np.int32)[mesh.face_material] for mesh in meshes]
    return Mesh(
        vertices=np.concatenate([mesh.vertices for mesh in meshes]),
        faces=np.concatenate([mesh.faces + offset for mesh, offset in zip(meshes, offsets)]),
        face_material=np.concatenate(face_material),
        materials=tuple(materials),
        corner_uv=_concatenate_corners([(mesh.corner_uv, len(mesh.faces)) for mesh in meshes], np.zeros(2)),
        corner_rgba=_concatenate_corners([(mesh.corner_rgba, len(mesh.faces)) for mesh in meshes], np.ones(4)),
    )


def _concatenate_corners(parts: list[tuple[np.ndarray | None, int]], missing: np.ndarray) -> np.ndarray | None:
    if all(corners is None for corners, _ in parts):
        return None
    return np.concatenate(
        [np.broadcast_to(missing, (n_faces, 3, len(missing))) if c is None else c for c, n_faces in parts]
    )


def _levels(texture: np.ndarray | None) -> list[np.ndarray | None]:
    """A texture and its smaller and smaller averages, down to one texel."""
    from .colour import halve

    levels = [texture]
    while texture is not None and max(texture.shape[:2]) > 1:
        smaller = np.empty((max(1, texture.shape[0] // 2), max(1, texture.shape[1] // 2), 4), np.uint8)
        halve(np.ascontiguousarray(texture), smaller)
        levels.append(texture := smaller)
    return levels


def _palette(materials: tuple[Material, ...], levels: list[list[np.ndarray | None]]) -> tuple[np.ndarray, ...]:
    """What `colour.albedo` knows of M materials, the texels of all levels of all textures in one row.

    Returns: base_M4, cutoff_M, texels_T, levels_ML3 and top_M, as they are there.
    """
    base_M4 = np.array([m.base_color_linear for m in materials], np.float32).reshape(-1, 4)
    cutoffs = {"OPAQUE": lambda m: -np.inf, "MASK": lambda m: m.alpha_cutoff, "BLEND": lambda m: np.nan}
    cutoff_M = np.array([cutoffs[m.alpha_mode](m) for m in materials], np.float32)
    images = {id(image): image for row in levels for image in row if image is not None}
    starts = dict(zip(images, np.cumsum([0, *(image.shape[0] * image.shape[1] for image in images.values())])))
    rows = [np.zeros((0, 4), np.uint8), *(np.ascontiguousarray(image).reshape(-1, 4) for image in images.values())]
    levels_ML3 = np.zeros((len(materials), max(map(len, levels), default=1), 3), np.int64)
    for m, row in enumerate(levels):
        for level, image in enumerate(row):
            if image is not None:
                levels_ML3[m, level] = starts[id(image)], image.shape[1], image.shape[0]
    texels_T = np.concatenate(rows).view("<u4")[:, 0].astype(np.uint32, copy=False)
    return base_M4, cutoff_M, texels_T, levels_ML3, np.array([len(row) - 1 for row in levels], np.int64)
