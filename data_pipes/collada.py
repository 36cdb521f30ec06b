"""Reads COLLADA 1.4 and 1.5 (.dae): geometry, scene graph, vertex colours, diffuse colours and textures.

Written by hand on the standard library because trimesh 5.2 needs one more package for it and passes over the axis that
is up and skins. Skinned meshes are at rest, posed by the joints as they stand in the scene. Colours are taken as sRGB,
as for MTL: COLLADA does not say. Alpha is not used: exporters do not agree on what COLLADA's transparency means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import unquote
from xml.etree.ElementTree import Element

import numpy as np
from scipy.sparse import coo_array

from . import xml_reader
from .limits import ANIMATED, Limits, Rejected, Sidecars, decode_image
from .mesh import WHITE, Material, Mesh, merge, srgb_to_linear
from .polygons import fans

__all__ = ["read_collada"]

_BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
# Rows: what is right, up and towards the viewer in the file's axes (COLLADA 1.4.1, "up_axis").
_TO_Y_UP = {
    "X_UP": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    "Y_UP": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "Z_UP": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
}
_POLYGONS = ("triangles", "polylist", "polygons", "tristrips", "trifans")
_JOINT_INPUTS = ("JOINT", "INV_BIND_MATRIX")
_TOO_DEEP = 100


def read_collada(data: bytes, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> Mesh:
    """The scene of a COLLADA file as one mesh: metres, +Y up.

    Args:
        warnings: gets a sentence for everything that was left out but does not spoil the mesh.
    Raises: Rejected.
    """
    try:
        return _Reader(xml_reader.tree(data), sidecars, limits, warnings).scene()
    except Rejected:
        raise
    except _BROKEN as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Rejected(f"its COLLADA structure is broken ({what})") from error


@dataclass(frozen=True)
class _Primitive:
    """Triangles of one material symbol; texture coordinates by set. `vertex_ids`: of `vertices` in their source."""

    symbol: str
    vertex_ids: np.ndarray
    vertices: np.ndarray
    faces: np.ndarray
    corner_uv: dict[int, np.ndarray]
    corner_rgba: np.ndarray | None


class _Reader:
    def __init__(self, root: Element, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> None:
        if root.tag != "COLLADA":
            raise Rejected(f"its XML is {root.tag[:40]!r}, not COLLADA")
        self.root, self.sidecars, self.limits, self.warnings = root, sidecars, limits, warnings
        self._by_id = {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}
        self._pixels_left = limits.texture_pixels
        self._sources: dict[Element, np.ndarray] = {}
        self._primitives: dict[str, list[_Primitive]] = {}
        self._materials: dict[str, tuple[Material, str]] = {}
        self._pictures: dict[str, np.ndarray | None] = {}
        self._parents = {child: parent for parent in root.iter() for child in parent}
        self._worlds: dict[Element, np.ndarray] = {}
        self._nodes = self._faces = 0

    def scene(self) -> Mesh:
        instance = self.root.find("scene/instance_visual_scene")
        scene = self.root.find("library_visual_scenes/visual_scene") if instance is None else self._target(instance)
        nodes = [] if scene is None else scene.findall("node")
        placed = [mesh for node in nodes for mesh in self._placed(node, np.eye(4), 0)]
        if not placed:
            raise Rejected("its scene has no triangles", "export the meshes too, as triangles", kind="empty")
        if self.root.find("library_animations//channel") is not None:
            self.warnings.append(ANIMATED)
        return merge(placed).transformed(self._to_metres_y_up())

    def _to_metres_y_up(self) -> np.ndarray:
        unit = self.root.find("asset/unit")
        metres = 1.0 if unit is None else float(unit.get("meter", 1.0))
        if not 0 < metres < np.inf:
            raise Rejected(f"its unit is {metres:g} metres long")
        matrix = np.eye(4)
        matrix[:3, :3] = metres * np.array(_TO_Y_UP[(self.root.findtext("asset/up_axis") or "Y_UP").strip()])
        return matrix

    def _target(self, element: Element, attribute: str = "url") -> Element:
        """The element that `#id` in an attribute names."""
        name = element.attrib[attribute].removeprefix("#")
        if name not in self._by_id:
            raise Rejected(f"its COLLADA structure is broken (there is no {name[:40]!r})")
        return self._by_id[name]

    # ------------------------------------------------------------------------------------------------ scene graph

    def _placed(self, node: Element, parent: np.ndarray, depth: int) -> Iterator[Mesh]:
        self._nodes += 1
        self.limits.check("nodes", self._nodes, self.limits.nodes)
        if depth > _TOO_DEEP:
            raise Rejected("its nodes contain themselves, or are too deep", "export it again with a plain node tree")
        world = parent @ _local(node)
        for child in node:
            if child.tag == "node":
                yield from self._placed(child, world, depth + 1)
            elif child.tag == "instance_node":
                yield from self._placed(self._target(child), world, depth + 1)
            elif child.tag == "instance_geometry":
                yield from self._instance(child, self._target(child), world)
            elif child.tag == "instance_controller":
                yield from self._controlled(child, world)

    def _controlled(self, instance: Element, world: np.ndarray) -> Iterator[Mesh]:
        """The geometry behind an <instance_controller>; morphs are passed over, of skins the first counts."""
        element, skin = self._target(instance), None
        for _ in range(_TOO_DEEP):
            if element.tag == "geometry":
                break
            deformer = element.find("skin")
            if deformer is not None and skin is None:
                skin = deformer
            elif deformer is None:
                deformer = element.find("morph")
            if deformer is None:
                raise Rejected("its COLLADA structure is broken (a controller that controls nothing)")
            element = self._target(deformer, "source")
        if skin is not None:
            try:
                world = self._pose(instance, skin)
            except _BROKEN:
                self.warnings.append("a skin is broken, so its mesh is placed by its node alone")
        yield from self._instance(instance, element, world)

    def _pose(self, instance: Element, skin: Element) -> np.ndarray:
        """The matrix [V, 4, 4] of each of a skin's vertices to the scene; the node's own does not count.

        sum_j w_j (joint_j inverse_bind_j) bind_shape / sum_j w_j   (COLLADA 1.4.1, "skin deformation")

        A vertex without weights stays where its bind shape puts it.
        """
        joints, bind_J44 = (self._target(_input(skin, "joints", name), "source") for name in _JOINT_INPUTS)
        roots = [self._by_id[(root.text or "").strip().removeprefix("#")] for root in instance.findall("skeleton")]
        names = [array.text or "" for array in joints if array.tag in ("Name_array", "IDREF_array")][0].split()
        joint_J44 = np.array([self._world(node) for node in self._joints(names, roots)])
        posed_J44 = np.concatenate([joint_J44 @ self._source(bind_J44).reshape(-1, 4, 4)[: len(names)], [np.eye(4)]])

        weighted = skin.findall("vertex_weights")[0]
        joint_input, weight_input = (_input(skin, "vertex_weights", name) for name in ("JOINT", "WEIGHT"))
        count_V, pairs = _integers(weighted.findtext("vcount")), _integers(weighted.findtext("v"))
        pairs_PI = pairs.reshape(-1, max(int(one.attrib["offset"]) for one in weighted.findall("input")) + 1)
        joint_P = pairs_PI[:, int(joint_input.attrib["offset"])]  # -1: the last of posed_J44, the bind shape as it is
        weights = self._source(self._target(weight_input, "source"))[:, 0]
        weight_P = weights[pairs_PI[:, int(weight_input.attrib["offset"])]]
        vertex_P = np.repeat(np.arange(len(count_V)), count_V)
        weight_VJ = coo_array(
            (weight_P, (vertex_P, np.where(joint_P < 0, len(names), joint_P))), (len(count_V), len(posed_J44))
        ).tocsr()
        sum_V = weight_VJ.sum(axis=1)
        bound_V = sum_V > 0
        pose_V44 = np.tile(np.eye(4), (len(count_V), 1, 1))
        pose_V44[bound_V] = (weight_VJ @ posed_J44.reshape(-1, 16)).reshape(-1, 4, 4)[bound_V]
        pose_V44[bound_V] /= sum_V[bound_V, None, None]
        if not np.isfinite(pose_V44).all():
            raise ValueError("a pose that is not finite")
        bind_shape = skin.findtext("bind_shape_matrix")
        return pose_V44 if bind_shape is None else pose_V44 @ _numbers(bind_shape).reshape(4, 4)

    def _joints(self, names: list[str], roots: list[Element]) -> list[Element]:
        """The nodes that a skin names by sid, those below a skeleton's root before all others, or by id."""
        by_sid: dict[str | None, Element] = {}
        for root in [*roots, self.root]:
            for node in root.iter("node"):
                by_sid.setdefault(node.get("sid"), node)
        return [by_sid[name] if name in by_sid else self._by_id[name] for name in names]

    def _world(self, node: Element) -> np.ndarray:
        """Of a node of the scene, from the root; nodes that are instances of others have no place of their own."""
        if node not in self._worlds:
            parent = self._parents.get(node)
            above = np.eye(4) if parent is None or parent.tag != "node" else self._world(parent)
            self._worlds[node] = above @ _local(node)
        return self._worlds[node]

    def _instance(self, instance: Element, geometry: Element, world: np.ndarray) -> Iterator[Mesh]:
        """A geometry with its materials, placed by one matrix [4, 4] or by one for each vertex [V, 4, 4]."""
        bindings = {bound.get("symbol", ""): bound for bound in instance.iter("instance_material")}
        for primitive in self._geometry(geometry):
            self._faces += len(primitive.faces)
            self.limits.check("faces", self._faces, self.limits.faces)
            material, uv = WHITE, None
            if (bound := bindings.get(primitive.symbol)) is not None:
                material, coordinate_name = self._material(bound)
                if material.texture is not None:
                    uv = primitive.corner_uv.get(_uv_set(bound, coordinate_name, primitive.corner_uv))
                    if uv is None:
                        self.warnings.append("a texture has no texture coordinates, so its colours are not used")
                        material = WHITE
            material_F = np.zeros(len(primitive.faces), np.int32)
            mesh = Mesh(primitive.vertices, primitive.faces, material_F, (material,), uv, primitive.corner_rgba)
            if world.ndim == 2:
                yield mesh.transformed(world)
            else:
                pose_V44 = world[primitive.vertex_ids]
                posed = np.einsum("vij,vj->vi", pose_V44[:, :3, :3], mesh.vertices) + pose_V44[:, :3, 3]
                yield replace(mesh, vertices=posed)

    # --------------------------------------------------------------------------------------------------- geometry

    def _geometry(self, geometry: Element) -> list[_Primitive]:
        name = geometry.attrib["id"]
        if name not in self._primitives:
            mesh = geometry.find("mesh")
            found = [] if mesh is None else [self._primitive(part) for part in mesh if part.tag in _POLYGONS]
            self._primitives[name] = [primitive for primitive in found if primitive is not None]
            if mesh is None or any(part.tag in ("lines", "linestrips") for part in mesh):
                self.warnings.append("lines and splines were left out")
        return self._primitives[name]

    def _primitive(self, part: Element) -> _Primitive | None:
        """All triangles of a <triangles>, <polylist>, <polygons>, <tristrips> or <trifans>; None if there are none."""
        inputs = part.findall("input")
        stride = max((int(one.attrib["offset"]) for one in inputs), default=0) + 1
        corners_KI, triangles_F3 = self._triangles(part, stride)
        if not len(triangles_F3):
            return None
        self.limits.check("faces", len(triangles_F3), self.limits.faces)
        corners_F3I = corners_KI[triangles_F3]
        vertex_ids = vertices = faces = rgba = None
        uv: dict[int, np.ndarray] = {}
        for one in inputs:
            index_F3 = corners_F3I[:, :, int(one.attrib["offset"])]
            shared = self._target(one, "source").findall("input") if one.attrib["semantic"] == "VERTEX" else [one]
            for attribute in shared:
                values_NC = self._source(self._target(attribute, "source"))
                if attribute.attrib["semantic"] not in ("POSITION", "TEXCOORD", "COLOR"):
                    continue
                if not (index_F3.min() >= 0 and index_F3.max() < len(values_NC)):
                    raise Rejected("a face names a vertex that does not exist")
                if attribute.attrib["semantic"] == "POSITION":
                    vertex_ids, inverse = np.unique(index_F3, return_inverse=True)
                    vertices, faces = values_NC[vertex_ids, :3], inverse.reshape(-1, 3)
                elif attribute.attrib["semantic"] == "TEXCOORD":
                    # COLLADA counts v upwards.
                    uv[int(attribute.get("set", 0))] = (values_NC[:, :2] * (1, -1) + (0, 1))[index_F3]
                elif rgba is None:
                    rgba = _linear(values_NC)[index_F3]
        if vertex_ids is None or vertices is None or faces is None:
            raise Rejected("its COLLADA structure is broken (faces without positions)")
        if not np.isfinite(vertices.astype(np.float32)).all():
            raise Rejected("some of its coordinates are not finite numbers", kind="not finite")
        return _Primitive(part.get("material", ""), vertex_ids, vertices, faces, uv, rgba)

    def _triangles(self, part: Element, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of indices, one per corner [K, stride], and which three rows each triangle has [F, 3]."""
        rows = [_integers(p.text).reshape(-1, stride) for p in part.findall("p")]
        if part.tag == "polygons" and part.find("ph") is not None:
            self.warnings.append("polygons with holes were left out")
        corners_KI = np.concatenate(rows) if rows else np.zeros((0, stride), np.int64)
        if part.tag == "triangles":
            return corners_KI, np.arange(len(corners_KI) // 3 * 3).reshape(-1, 3)
        count_P = _integers(part.findtext("vcount")) if part.tag == "polylist" else np.array([len(row) for row in rows])
        if not ((count_P >= 0) & (count_P <= len(corners_KI))).all() or count_P.sum() > len(corners_KI):
            raise Rejected("its polygons have fewer corners than they say", "copy or download it again")
        corners_F3, _ = fans(count_P)
        if part.tag == "tristrips":
            k_F = corners_F3[:, 1] - corners_F3[:, 0] - 1
            odd_F = k_F % 2  # every other triangle of a strip is wound the other way
            corners_F3 = corners_F3[:, :1] + np.stack([k_F, k_F + 1 + odd_F, k_F + 2 - odd_F], axis=1)
        return corners_KI, corners_F3

    def _source(self, source: Element) -> np.ndarray:
        """[count, stride] of a <source>."""
        if source in self._sources:
            return self._sources[source]
        accessor = source.find("technique_common/accessor")
        if accessor is None:
            raise Rejected("its COLLADA structure is broken (a source without accessor)")
        count, stride = int(accessor.attrib["count"]), int(accessor.get("stride", 1))
        offset = int(accessor.get("offset", 0))
        values = _numbers(self._target(accessor, "source").text)
        if min(count, stride, offset) < 0 or offset + count * stride > len(values):
            raise Rejected("its data is shorter than it says", "copy or download it again")
        self.limits.check("values in one source", count, 3 * max(self.limits.vertices, self.limits.faces))
        self._sources[source] = values[offset : offset + count * stride].reshape(count, stride)
        return self._sources[source]

    # ---------------------------------------------------------------------------------------------------- colours

    def _material(self, bound: Element) -> tuple[Material, str]:
        """The material of an <instance_material> and the name its texture has for texture coordinates."""
        name = bound.attrib["target"]
        if name not in self._materials:
            instance = self._target(bound, "target").find("instance_effect")
            profile = None if instance is None else self._target(instance).find("profile_COMMON")
            self._materials[name] = (WHITE, "") if profile is None else self._effect(profile)
        return self._materials[name]

    def _effect(self, profile: Element) -> tuple[Material, str]:
        # <constant> has no diffuse colour: what it shows is its emission.
        for path in ("technique//diffuse", "technique/constant/emission"):
            if (shown := profile.find(path)) is None:
                continue
            if (texture := shown.find("texture")) is not None:
                picture = self._picture(self._image(profile, texture.attrib["texture"]))
                return (WHITE if picture is None else Material(np.ones(4), picture)), texture.get("texcoord", "")
            if (color := shown.findtext("color")) is not None:
                return Material(_linear(_numbers(color)[None])[0]), ""
        return WHITE, ""

    def _image(self, profile: Element, name: str) -> str:
        """The URI of the image behind a sampler's name: sampler, surface, image, or from 1.5 on sampler, image."""
        parameters = {parameter.get("sid", ""): parameter for parameter in profile.iter("newparam")}
        for _ in range(3):
            parameter = parameters.get(name)
            if parameter is None:
                break
            instance = parameter.find("sampler2D/instance_image")
            if instance is not None:
                name = instance.attrib["url"].removeprefix("#")
                break
            name = (parameter.findtext("sampler2D/source") or parameter.findtext("surface/init_from") or "").strip()
        image = self._by_id.get(name)
        if image is None:
            return ""
        return (image.findtext("init_from/ref") or image.findtext("init_from") or "").strip()

    def _picture(self, uri: str) -> np.ndarray | None:
        """uint8 [H, W, 4], or None (and a warning) where it is missing or cannot be decoded."""
        if uri not in self._pictures:
            name, picture = _file_name(uri), None
            try:
                picture = decode_image(self.sidecars.read(name), self._pixels_left)
                self._pixels_left -= picture.shape[0] * picture.shape[1]
            except FileNotFoundError:
                self.warnings.append(f"the texture file {name[:80]!r} is missing, so its colours are not used")
            except (OSError, SyntaxError):
                self.warnings.append(f"the texture {name[:80]!r} cannot be decoded, so its colours are not used")
            self._pictures[uri] = picture
        return self._pictures[uri]


def _local(node: Element) -> np.ndarray:
    """The product of a node's transforms in the order of the file."""
    matrix = np.eye(4)
    for child in node:
        if child.tag == "matrix":
            matrix = matrix @ _numbers(child.text).reshape(4, 4)
        elif child.tag == "translate":
            step = np.eye(4)
            step[:3, 3] = _numbers(child.text)
            matrix = matrix @ step
        elif child.tag == "scale":
            x, y, z = _numbers(child.text)
            matrix = matrix @ np.diag([x, y, z, 1])
        elif child.tag == "rotate":
            matrix = matrix @ _rotation(*_numbers(child.text))
    return matrix


def _rotation(x: float, y: float, z: float, degrees: float) -> np.ndarray:
    """About an axis by an angle (Rodrigues)."""
    axis_3 = np.array([x, y, z]) / max(float(np.linalg.norm([x, y, z])), 1e-12)
    cross = np.cross(np.eye(3), axis_3)  # cross @ v is axis x v
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return matrix


def _uv_set(bound: Element, coordinate_name: str, sets: dict[int, np.ndarray]) -> int:
    """Which set of texture coordinates a texture means; the first where the file does not say."""
    for binding in bound.findall("bind_vertex_input"):
        if binding.get("semantic") == coordinate_name and binding.get("input_semantic") == "TEXCOORD":
            return int(binding.get("input_set", 0))
    return min(sets, default=0)


def _file_name(uri: str) -> str:
    """An image's URI as a path beside the file; of a path on the exporter's machine the name alone."""
    path = unquote(uri.removeprefix("file://")).replace("\\", "/")
    return path.rpartition("/")[2] if re.match(r"/|[A-Za-z]:", path) else path


def _input(skin: Element, place: str, semantic: str) -> Element:
    """Raises: IndexError if there is none."""
    return [one for one in skin.findall(f"{place}/input") if one.attrib["semantic"] == semantic][0]


def _numbers(text: str | None) -> np.ndarray:
    return np.array((text or "").split(), np.float64)


def _integers(text: str | None) -> np.ndarray:
    return np.array((text or "").split(), np.int64)


def _linear(srgb_NC: np.ndarray) -> np.ndarray:
    """[N, 4] linear RGBA of sRGB colours with 3 or 4 columns; alpha is not used."""
    rgba_N4 = np.ones((len(srgb_NC), 4), np.float32)
    rgba_N4[:, :3] = srgb_to_linear(np.nan_to_num(srgb_NC[:, :3]))
    return rgba_N4
