"""Reads USD (.usd, .usda, .usdc, .usdz): meshes, transforms, instances, display colours and UsdPreviewSurface.

Composition, crate files and value resolution are the USD library's (the extra [usd]); what it may open is settled in
usd_layers.py. Importing this module needs it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pxr import Tf, Usd, UsdGeom, UsdShade, UsdUtils, Work

from .limits import ANIMATED, Limits, Rejected, Sidecars
from .mesh import WHITE, Material, Mesh, merge
from .polygons import fans
from .usd_layers import Layers
from .usd_materials import Look, Materials

__all__ = ["read_usd"]

_BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, Tf.ErrorException)
_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
_VISIBLE = Usd.TraverseInstanceProxies(Usd.PrimDefaultPredicate)
_MOST_NESTED = 10  # point instancers in prototypes of point instancers
_PURPOSES_SHOWN = ("default", "render")


def read_usd(data: bytes, suffix: str, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> Mesh:
    """The scene of a USD file as one mesh: metres, +Y up.

    Values are those at rest (USD's default time), or the earliest where a file has none. Subdivision surfaces are
    taken as their cages. Invisible prims, proxies and guides are left out without a word.

    Args:
        suffix: of the file's name, .usdz for a package.
        warnings: gets a sentence for everything that was left out but does not spoil the mesh.
    Raises: Rejected.
    """
    Work.SetConcurrencyLimit(1)  # one file, one thread
    diagnostics = UsdUtils.CoalescingDiagnosticDelegate()  # what it holds is not printed
    try:
        with tempfile.TemporaryDirectory(prefix="shapeloom-usd-") as folder:
            layers = Layers(sidecars, limits, warnings, Path(folder))
            root = layers.root(data, suffix)
            return _Reader(Usd.Stage.Open(root), layers, limits, warnings).scene()
    except (Rejected, MemoryError):
        raise
    except _BROKEN as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Rejected(f"its USD structure is broken ({what})") from error
    finally:
        del diagnostics


class _Reader:
    def __init__(self, stage: Any, layers: Layers, limits: Limits, warnings: list[str]) -> None:
        self.stage, self.limits, self.warnings = stage, limits, warnings
        self._materials = Materials(layers, limits, warnings, self._value)
        self._prototypes: dict[tuple[Any, str], Mesh | None] = {}
        self._nodes = self._faces = self._nested = 0
        if layers.has_clips:
            self._animated()

    def scene(self) -> Mesh:
        placed = list(self._below(self.stage.GetPseudoRoot(), np.eye(4), "default"))
        if not placed:
            raise Rejected("its scene has no triangles", "export the meshes too, as triangles", kind="empty")
        metres = UsdGeom.GetStageMetersPerUnit(self.stage)
        if not 0 < metres < np.inf:
            raise Rejected(f"its unit is {metres:g} metres long")
        up = _Z_UP if UsdGeom.GetStageUpAxis(self.stage) == UsdGeom.Tokens.z else np.eye(4)
        return merge(placed).transformed(up @ np.diag([metres, metres, metres, 1]))

    # ------------------------------------------------------------------------------------------------ scene graph

    def _below(self, root: Any, world: np.ndarray, purpose: str, *, is_prototype: bool = False) -> Iterator[Mesh]:
        """Meshes of a prim and its descendants; a prototype's own transform is part of its instances'."""
        stack = [(root, world, purpose)]
        while stack:
            prim, world, purpose = stack.pop()
            self._node()
            if prim.IsA(UsdGeom.Xformable) and not (is_prototype and prim == root):
                local, resets = self._local(UsdGeom.Xformable(prim))
                world = local if resets else world @ local
            if prim.IsA(UsdGeom.Imageable):
                imageable = UsdGeom.Imageable(prim)
                if self._value(imageable.GetVisibilityAttr()) == UsdGeom.Tokens.invisible:
                    continue
                if imageable.GetPurposeAttr().HasAuthoredValue():
                    purpose = self._value(imageable.GetPurposeAttr())
            if prim.GetTypeName() == "SkelAnimation":
                self._animated()
            if prim.IsA(UsdGeom.PointInstancer):
                yield from self._instances(UsdGeom.PointInstancer(prim), world, purpose)
                continue  # prototypes may lie below, but are no part of the scene themselves
            if prim.IsA(UsdGeom.Gprim) and purpose in _PURPOSES_SHOWN:
                if prim.IsA(UsdGeom.Mesh):
                    yield from (self._counted(part).transformed(world) for part in self._mesh(UsdGeom.Mesh(prim)))
                else:
                    self._warn(f"what is no mesh was left out ({prim.GetTypeName()})")
            stack += [(child, world, purpose) for child in prim.GetFilteredChildren(_VISIBLE)[::-1]]

    def _instances(self, instancer: Any, world: np.ndarray, purpose: str) -> Iterator[Mesh]:
        indices_N = np.array(self._value(instancer.GetProtoIndicesAttr()) or [], np.int64)
        self._node(len(indices_N))
        targets = instancer.GetPrototypesRel().GetForwardedTargets()
        if len(indices_N) and not (indices_N.min() >= 0 and indices_N.max() < len(targets)):
            raise Rejected("a point instancer names a prototype that does not exist")
        time = self._time(instancer.GetPositionsAttr())
        matrices = instancer.ComputeInstanceTransformsAtTime(
            time, time, UsdGeom.PointInstancer.IncludeProtoXform, UsdGeom.PointInstancer.IgnoreMask
        )
        if len(matrices) != len(indices_N):
            raise Rejected("a point instancer has not as many positions as instances")
        is_shown = instancer.ComputeMaskAtTime(time) or [True] * len(indices_N)
        for index, matrix, shown in zip(indices_N, matrices, is_shown):
            mesh = self._prototype(targets[index], purpose) if shown else None
            if mesh is not None:
                yield self._counted(mesh).transformed(world @ _finite(np.array(matrix).T))

    def _prototype(self, path: Any, purpose: str) -> Mesh | None:
        key = path, purpose
        if key not in self._prototypes:
            if self._nested >= _MOST_NESTED:
                raise Rejected("its point instancers contain themselves, or are too deep")
            self._nested += 1
            prim, faces = self.stage.GetPrimAtPath(path), self._faces
            parts = list(self._below(prim, np.eye(4), purpose, is_prototype=True)) if prim else []
            self._nested -= 1
            self._faces = faces  # counted where it is placed
            self._prototypes[key] = merge(parts) if parts else None
        return self._prototypes[key]

    def _local(self, xformable: Any) -> tuple[np.ndarray, bool]:
        """The product of a prim's transforms, and whether it begins anew from the scene's root."""
        matrix = np.eye(4)
        for op in xformable.GetOrderedXformOps():
            matrix = matrix @ np.array(op.GetOpTransform(self._time(op.GetAttr()))).T
        return _finite(matrix), xformable.GetResetXformStack()

    def _node(self, count: int = 1) -> None:
        self._nodes += count
        self.limits.check("nodes", self._nodes, self.limits.nodes)

    def _counted(self, mesh: Mesh) -> Mesh:
        self._faces += len(mesh.faces)
        self.limits.check("faces", self._faces, self.limits.faces)
        return mesh

    # ----------------------------------------------------------------------------------------------------- values

    def _time(self, attribute: Any) -> Any:
        """The default time, or the earliest for an attribute with samples alone."""
        n_samples = attribute.GetNumTimeSamples()
        if not n_samples:
            return Usd.TimeCode.Default()
        if n_samples > 1:
            self._animated()
        source = attribute.GetResolveInfo(Usd.TimeCode.Default()).GetSource()
        has_value = source not in (Usd.ResolveInfoSourceNone, Usd.ResolveInfoSourceFallback)
        return Usd.TimeCode.Default() if has_value else Usd.TimeCode.EarliestTime()

    def _value(self, attribute: Any) -> Any:
        return attribute.Get(self._time(attribute))

    # --------------------------------------------------------------------------------------------------- geometry

    def _mesh(self, mesh: Any) -> list[Mesh]:
        """A mesh prim in its own frame, one part for each material."""
        points_V3 = np.array(self._value(mesh.GetPointsAttr()) or [], np.float32).reshape(-1, 3)
        count_P, index_C = (
            np.array(self._value(attribute) or [], np.int64)
            for attribute in (mesh.GetFaceVertexCountsAttr(), mesh.GetFaceVertexIndicesAttr())
        )
        if (count_P < 0).any() or count_P.sum() > len(index_C):
            raise Rejected("its polygons have fewer corners than they say", "copy or download it again")
        self.limits.check("vertices", len(points_V3), self.limits.vertices)
        self.limits.check("faces", int(np.maximum(count_P - 2, 0).sum()), self.limits.faces)
        if self._value(mesh.GetSubdivisionSchemeAttr()) != UsdGeom.Tokens.none:
            self._warn("its subdivision surfaces are not subdivided: their cages are taken")
        corner_F3, polygon_F = fans(count_P)
        if len(holes := np.array(self._value(mesh.GetHoleIndicesAttr()) or [], np.int64)):
            corner_F3, polygon_F = (of[~np.isin(polygon_F, holes)] for of in (corner_F3, polygon_F))
        if self._value(mesh.GetOrientationAttr()) == UsdGeom.Tokens.leftHanded:
            corner_F3 = corner_F3[:, ::-1]
        faces_F3 = index_C[corner_F3]
        if not len(faces_F3):
            return []
        if not (faces_F3.min() >= 0 and faces_F3.max() < len(points_V3)):
            raise Rejected("a face names a vertex that does not exist")
        if not np.isfinite(points_V3[faces_F3]).all():
            raise Rejected("some of its coordinates are not finite numbers", kind="not finite")

        def corners(name: str, columns: int, some_F: np.ndarray) -> np.ndarray | None:
            values = self._primvar(mesh, name, columns, len(points_V3), len(count_P), len(index_C))
            if values is None:
                return None
            by = {"uniform": polygon_F[:, None], "vertex": faces_F3, "varying": faces_F3, "faceVarying": corner_F3}
            interpolation, values_NC = values
            index_F3 = by.get(interpolation, np.zeros((len(faces_F3), 1), np.int64))
            return np.broadcast_to(values_NC[index_F3[some_F]], (some_F.sum(), 3, columns))

        parts = []
        for material, polygons in self._bound(mesh, len(count_P)):
            some_F = polygons[polygon_F]
            if some_F.any():
                used, inverse = np.unique(faces_F3[some_F], return_inverse=True)
                look = self._materials.look(material) if material else None
                shown, uv, rgba = self._coloured(look, lambda name, columns, some=some_F: corners(name, columns, some))
                material_F = np.zeros(some_F.sum(), np.int32)
                parts.append(Mesh(points_V3[used], inverse.reshape(-1, 3), material_F, (shown,), uv, rgba))
        return parts

    def _bound(self, mesh: Any, n_polygons: int) -> Iterator[tuple[Any, np.ndarray]]:
        """Materials (None: none), each with a mask [P] of its polygons."""
        left_P = np.ones(n_polygons, bool)
        for subset in UsdShade.MaterialBindingAPI(mesh).GetMaterialBindSubsets():
            indices = np.array(self._value(subset.GetIndicesAttr()) or [], np.int64)
            if not ((indices >= 0) & (indices < n_polygons)).all():
                raise Rejected("a subset names a face that does not exist")
            mine_P = np.zeros(n_polygons, bool)
            mine_P[indices] = True
            yield _material_of(subset), mine_P & left_P
            left_P &= ~mine_P
        yield _material_of(mesh), left_P

    def _primvar(
        self, mesh: Any, name: str, columns: int, n_points: int, n_polygons: int, n_corners: int
    ) -> tuple[str, np.ndarray] | None:
        """Interpolation and values [N, columns]; None if there are none, or (with a warning) not as many as needed."""
        primvar = UsdGeom.PrimvarsAPI(mesh).FindPrimvarWithInheritance(name)
        if not primvar or not primvar.HasValue():
            return None
        values = primvar.ComputeFlattened(self._time(primvar.GetAttr()))
        interpolation = primvar.GetInterpolation()
        needed = {"uniform": n_polygons, "vertex": n_points, "varying": n_points, "faceVarying": n_corners}
        try:
            values_NC = np.array(values, np.float32).reshape(-1, columns)
        except (TypeError, ValueError):
            values_NC = np.zeros((0, columns), np.float32)
        if not len(values_NC) or len(values_NC) < needed.get(interpolation, 1):
            self._warn(f"the primvar {name[:40]!r} has too few values, or of another kind, so it is not used")
            return None
        return interpolation, np.nan_to_num(values_NC)

    def _coloured(self, look: Look | None, corners: Any) -> tuple[Material, np.ndarray | None, np.ndarray | None]:
        """The material of some faces, their texture coordinates [F, 3, 2] and colours [F, 3, 4]."""
        if look is None:
            color, opacity = corners("displayColor", 3), corners("displayOpacity", 1)
            rgba = _rgba(color, opacity)
            is_clear = opacity is not None and opacity.min() < 1
            return (Material(np.ones(4), alpha_mode="BLEND") if is_clear else WHITE), None, rgba
        rgba = None if look.color is None else _rgba(corners(look.color, 3), None)
        if look.st is None:
            return look.material, None, rgba
        st = corners(look.st, 2)
        if st is None:
            self._warn("a texture has no texture coordinates, so its colours are not used")
            return Material(look.material.base_color_linear), None, rgba
        st = st @ look.to_uv[:, :2].T + look.to_uv[:, 2]
        if look.single and (st.min() < 0 or st.max() > 1):
            self._warn("a texture that should not repeat does where its coordinates leave it")
        return look.material, st * (1, -1) + (0, 1), rgba

    def _animated(self) -> None:
        self._warn(ANIMATED)

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def _material_of(schema: Any) -> Any:
    material, _ = UsdShade.MaterialBindingAPI(schema).ComputeBoundMaterial(UsdShade.Tokens.preview)
    return material or None


def _rgba(color_F33: np.ndarray | None, opacity_F31: np.ndarray | None) -> np.ndarray | None:
    if color_F33 is None and opacity_F31 is None:
        return None
    one = color_F33 if color_F33 is not None else opacity_F31
    assert one is not None
    rgba = np.ones((len(one), 3, 4), np.float32)
    if color_F33 is not None:
        rgba[..., :3] = color_F33
    if opacity_F31 is not None:
        rgba[..., 3:] = opacity_F31
    return rgba


def _finite(matrix: np.ndarray) -> np.ndarray:
    if not np.isfinite(matrix).all():
        raise Rejected("a node's transform is not finite", kind="not finite")
    return matrix
