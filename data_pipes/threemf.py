"""Reads 3MF: meshes, components, base materials, colour groups and textures (3MF core 1.3, materials extension 1.2).

Written by hand on the standard library because trimesh 5.2 needs two more packages for it and passes over all colours.
Left out, with a warning: composites and multi-properties. Supports are left out without a word: they are no part of
the object.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from . import xml_reader
from .limits import Limits, Rejected, decode_image
from .mesh import WHITE, Material, Mesh, merge, srgb_to_linear

__all__ = ["read_3mf"]

_METRES = {"micron": 1e-6, "millimeter": 1e-3, "centimeter": 1e-2, "inch": 0.0254, "foot": 0.3048, "meter": 1.0}
_BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
_MODEL_RELATIONSHIP = "http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"


def read_3mf(data: bytes, limits: Limits, warnings: list[str]) -> Mesh:
    """What a 3MF file builds, as one mesh: metres, +Y up (3MF itself is +Z up, in a unit that it names).

    Args:
        warnings: gets a sentence for everything that was left out but does not spoil the mesh.
    Raises: Rejected.
    """
    try:
        return _Reader(data, limits, warnings).build()
    except Rejected:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: encrypted
        raise Rejected(f"its ZIP archive cannot be read ({str(error)[:80]})", "copy or download it again") from None
    except _BROKEN as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Rejected(f"its 3MF structure is broken ({what})") from error


@dataclass
class _Group:
    """Properties that triangles name by index: colours, or texture coordinates where `texture` is an id."""

    texture: str | None = None
    hex_colors: list[str] = field(default_factory=list)
    uv: array = field(default_factory=lambda: array("f"))


@dataclass(frozen=True)
class _Reference:
    """An object placed by `matrix` [4, 4], in the model part `part`."""

    part: str
    object_id: str
    matrix: np.ndarray


@dataclass
class _Object:
    group: str = ""
    index: int = -1
    is_support: bool = False
    vertices: array = field(default_factory=lambda: array("d"))
    corners: array = field(default_factory=lambda: array("q"))
    corner_property: array = field(default_factory=lambda: array("q"))  # -1: none
    face_group: list[str] = field(default_factory=list)
    components: list[_Reference] = field(default_factory=list)


class _Model:
    """One model part of the package, read in one pass that keeps numbers alone."""

    def __init__(self, name: str, data: bytes, limits: Limits, warnings: list[str]) -> None:
        self.name, self._limits, self._warnings = name, limits, warnings
        self.unit = "millimeter"
        self.objects: dict[str, _Object] = {}
        self.groups: dict[str, _Group] = {}
        self.textures: dict[str, str] = {}
        self.items: list[_Reference] = []
        self.meshes: dict[str, Mesh | None] = {}
        self._object = _Object()
        self._group = _Group()
        xml_reader.parse(data, self._start)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "vertex":
            self._object.vertices.extend(float(attributes[axis]) for axis in "xyz")
            self._limits.check("vertices", len(self._object.vertices) // 3, self._limits.vertices)
        elif tag == "triangle":
            self._triangle(attributes)
        elif tag == "object":
            kind = attributes.get("type", "model")
            index = int(attributes.get("pindex", -1))
            self._object = _Object(attributes.get("pid", ""), index, kind in ("support", "solidsupport", "other"))
            self.objects[attributes["id"]] = self._object
        elif tag == "component":
            self._object.components.append(self._reference(attributes))
        elif tag == "item":
            self.items.append(self._reference(attributes))
        elif tag in ("basematerials", "colorgroup", "texture2dgroup"):
            self._group = self.groups[attributes["id"]] = _Group(attributes.get("texid"))
        elif tag in ("base", "color"):
            self._group.hex_colors.append(attributes["displaycolor" if tag == "base" else "color"])
        elif tag == "tex2coord":
            self._group.uv.extend((float(attributes["u"]), float(attributes["v"])))
        elif tag == "texture2d":
            self.textures[attributes["id"]] = attributes["path"]
        elif tag == "model":
            self.unit = attributes.get("unit", self.unit)
        elif tag in ("compositematerials", "multiproperties"):
            self._warnings.append("composite materials are not read, so their colours are not used")

    def _triangle(self, attributes: dict[str, str]) -> None:
        thing = self._object
        thing.corners.extend(int(attributes[corner]) for corner in ("v1", "v2", "v3"))
        first = int(attributes.get("p1", thing.index))
        thing.corner_property.extend((first, int(attributes.get("p2", first)), int(attributes.get("p3", first))))
        thing.face_group.append(attributes.get("pid", thing.group))
        self._limits.check("faces", len(thing.face_group), self._limits.faces)

    def _reference(self, attributes: dict[str, str]) -> _Reference:
        """The transform is 4 rows of 3 numbers that multiply a row vector from the right (core 1.3, section 3.3)."""
        matrix = np.eye(4)
        if "transform" in attributes:
            matrix[:3] = np.array(attributes["transform"].split(), np.float64).reshape(4, 3).T
        return _Reference(attributes.get("path", self.name), attributes["objectid"], matrix)


class _Reader:
    def __init__(self, data: bytes, limits: Limits, warnings: list[str]) -> None:
        self.limits, self.warnings = limits, warnings
        self._archive = zipfile.ZipFile(io.BytesIO(data))
        self._names = {name.lower(): name for name in self._archive.namelist()}
        self._bytes_left, self._pixels_left = limits.file_bytes, limits.texture_pixels
        self._models: dict[str, _Model] = {}
        self._pictures: dict[str, np.ndarray | None] = {}
        self._nodes = self._faces = 0

    def build(self) -> Mesh:
        root = self._model(self._root_part())
        placed = [mesh for item in root.items for mesh in self._placed(item, np.eye(4), ())]
        if not placed:
            raise Rejected("it builds no triangles", "export the meshes too, as triangles", kind="empty")
        metres = _METRES.get(root.unit)
        if metres is None:
            raise Rejected(f"it is in {root.unit[:20]!r}, which is no unit of 3MF")
        return merge(placed).transformed(_Z_UP @ np.diag([metres, metres, metres, 1]))

    def _root_part(self) -> str:
        targets: list[str] = []

        def start(tag: str, attributes: dict[str, str]) -> None:
            if tag == "Relationship" and attributes.get("Type") == _MODEL_RELATIONSHIP:
                targets.append(attributes["Target"])

        xml_reader.parse(self._part("_rels/.rels"), start)
        if not targets:
            raise Rejected("its package names no 3D model")
        return targets[0]

    def _part(self, name: str) -> bytes:
        """The bytes of a part of the package; parts together may hold what one file may."""
        found = self._names.get(name.lstrip("/").lower())
        if found is None:
            raise Rejected(f"its part {name[:80]!r} is missing", "copy or download it again")
        if self._archive.getinfo(found).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Rejected("it is compressed in a way that 3MF does not allow", "save it again as 3MF")
        with self._archive.open(found) as file:
            data = file.read(self._bytes_left + 1)
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise Rejected(f"it unpacks to more than the {self.limits.file_bytes:,} bytes allowed", "leave it out")
        return data

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            self._models[name] = _Model(name, self._part(name), self.limits, self.warnings)
        return self._models[name]

    def _placed(self, reference: _Reference, parent: np.ndarray, above: tuple[tuple[str, str], ...]) -> Iterator[Mesh]:
        """The meshes of an object and its components in the build's frame; `above` are the objects it is part of."""
        self._nodes += 1
        self.limits.check("components", self._nodes, self.limits.nodes)
        key = (reference.part, reference.object_id)
        if key in above or len(above) > 100:
            raise Rejected(f"its object {reference.object_id[:40]} is a part of itself, or too deep")
        model = self._model(reference.part)
        thing = model.objects.get(reference.object_id)
        if thing is None:
            raise Rejected(f"its object {reference.object_id[:40]!r} is missing")
        if thing.is_support:
            return
        world = parent @ reference.matrix
        if reference.object_id not in model.meshes:
            model.meshes[reference.object_id] = self._mesh(model, thing)
        mesh = model.meshes[reference.object_id]
        if mesh is not None:
            self._faces += len(mesh.faces)
            self.limits.check("faces", self._faces, self.limits.faces)
            yield mesh.transformed(world)
        for component in thing.components:
            yield from self._placed(component, world, (*above, key))

    def _mesh(self, model: _Model, thing: _Object) -> Mesh | None:
        """An object's own triangles in its own frame."""
        faces_F3 = np.array(thing.corners, np.int64).reshape(-1, 3)
        vertices_V3 = np.array(thing.vertices, np.float64).reshape(-1, 3)
        if not len(faces_F3):
            return None
        if not (faces_F3.min() >= 0 and faces_F3.max() < len(vertices_V3)):
            raise Rejected("a face names a vertex that does not exist")
        if not np.isfinite(vertices_V3.astype(np.float32)).all():
            raise Rejected("some of its coordinates are not finite numbers", kind="not finite")
        property_F3 = np.array(thing.corner_property, np.int64).reshape(-1, 3)
        group_F = np.array(thing.face_group)
        rgba_F34 = np.ones((len(faces_F3), 3, 4), np.float32)
        uv_F32 = np.zeros((len(faces_F3), 3, 2), np.float32)
        material_F, materials = np.zeros(len(faces_F3), np.int32), [WHITE]
        for name in np.unique(group_F):
            group = model.groups.get(str(name))
            mine_F = (group_F == name) & (property_F3 >= 0).all(axis=1)
            if group is None or not mine_F.any():
                continue
            if group.texture is None:
                rgba_F34[mine_F] = _linear(group.hex_colors)[property_F3[mine_F]]
            elif (picture := self._picture(model.textures[group.texture])) is not None:
                # 3MF counts v upwards.
                uv_F32[mine_F] = (np.array(group.uv).reshape(-1, 2) * (1, -1) + (0, 1))[property_F3[mine_F]]
                material_F[mine_F] = len(materials)
                materials.append(Material(np.ones(4), picture))
        uv = uv_F32 if len(materials) > 1 else None
        return Mesh(
            vertices_V3, faces_F3, material_F, tuple(materials), uv, None if (rgba_F34 == 1).all() else rgba_F34
        )

    def _picture(self, name: str) -> np.ndarray | None:
        """uint8 [H, W, 4], or None (and a warning) where it cannot be decoded."""
        if name not in self._pictures:
            try:
                picture = decode_image(self._part(name), self._pixels_left)
                self._pixels_left -= picture.shape[0] * picture.shape[1]
            except (OSError, SyntaxError):
                self.warnings.append(f"the texture {name[:80]!r} cannot be decoded, so its colours are not used")
                picture = None
            self._pictures[name] = picture
        return self._pictures[name]


def _linear(hex_colors: list[str]) -> np.ndarray:
    """[N, 4] linear RGBA of "#RRGGBB" or "#RRGGBBAA" in sRGB; alpha is left at 1, as for the other plain formats."""
    rgb_N3 = np.array([list(bytes.fromhex(color.strip().removeprefix("#"))[:3]) for color in hex_colors], np.uint8)
    rgba_N4 = np.ones((len(hex_colors), 4), np.float32)
    rgba_N4[:, :3] = srgb_to_linear(rgb_N3)
    return rgba_N4
