"""Reads glTF 2.0 (.gltf, .glb): geometry, base colours, textures, vertex colours, scene graph, skins at rest.

Written by hand because trimesh 5.2 rounds base colour factors to 8 bits of *linear* light (dark colours visibly
shift) and passes over sparse and normalised accessors, other texture coordinate sets than the first, triangle fans
and skins. Every value in the file is taken as hostile: whatever is of a wrong type or out of range ends in `Rejected`.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .limits import Limits, Rejected, Sidecars, decode_image
from .mesh import Material, Mesh, merge

__all__ = ["read_gltf"]

_DTYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_TRIANGLES, _STRIP, _FAN = 4, 5, 6
_UNREADABLE = {"EXT_meshopt_compression": "meshopt", "KHR_meshopt_compression": "meshopt"}
_BROKEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error)


def read_gltf(data: bytes, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> Mesh:
    """The default scene of a glTF file as one mesh in the scene's frame.

    Args:
        data: the bytes of the .gltf or .glb file.
        warnings: gets a sentence for everything that was left out but does not spoil the mesh.
    Raises: Rejected.
    """
    try:
        return _Reader(data, sidecars, limits, warnings).scene()
    except Rejected:
        raise
    except _BROKEN as error:
        raise Rejected(f"its glTF structure is broken ({type(error).__name__}: {str(error)[:120]})") from error


def _split(data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The JSON header and the binary chunk, if there is one."""
    chunk = None
    if data[:4] == b"glTF":
        if len(data) < 20:
            raise Rejected("it ends before its JSON header", "copy or download it again")
        version, length = struct.unpack_from("<II", data, 4)
        if version != 2:
            raise Rejected(f"it is glTF version {version}", "convert it to glTF 2.0")
        if length > len(data):
            raise Rejected(f"it is cut short: {len(data)} of {length} bytes", "copy or download it again")
        size, kind = struct.unpack_from("<I4s", data, 12)
        if kind != b"JSON" or 20 + size > len(data):
            raise Rejected("it does not begin with a whole JSON chunk", "copy or download it again")
        if 28 + size <= length:
            chunk_size, chunk_kind = struct.unpack_from("<I4s", data, 20 + size)
            chunk = data[28 + size : 28 + size + chunk_size] if chunk_kind == b"BIN\0" else None
            if chunk is not None and len(chunk) < chunk_size:
                raise Rejected("its binary chunk is cut short", "copy or download it again")
        data = data[20 : 20 + size]
    try:
        header = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Rejected("its glTF header is not JSON", "copy or download it again") from None
    if not isinstance(header, dict):
        raise Rejected("its glTF header is not a JSON object", "copy or download it again")
    return header, chunk


class _Reader:
    def __init__(self, data: bytes, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> None:
        self.header, self.chunk = _split(data)
        self.sidecars, self.limits, self.warnings = sidecars, limits, warnings
        self.pixels_left = limits.texture_pixels
        self._buffers: dict[int, bytes] = {}
        self._images: dict[int, np.ndarray | None] = {}
        self._materials: dict[int, tuple[Material, dict]] = {}
        self._meshes: dict[int, list[tuple[Mesh, dict[str, np.ndarray]]]] = {}
        self._check_header()

    def _check_header(self) -> None:
        version = str(self.header["asset"].get("version", "2.0"))
        if not version.startswith("2"):
            raise Rejected(f"it is glTF version {version[:20]}", "convert it to glTF 2.0")
        for name in self.header.get("extensionsRequired", []):
            if name in _UNREADABLE:
                raise Rejected(f"it is compressed with {_UNREADABLE[name]} ({name})", "export it without compression")
        self.limits.check("nodes", len(self.header.get("nodes", [])), self.limits.nodes)

    def _item(self, kind: str, index: Any) -> dict[str, Any]:
        items = self.header.get(kind)
        if not isinstance(items, list) or type(index) is not int or not 0 <= index < len(items):
            raise Rejected(f"its glTF structure is broken ({kind} has no entry {str(index)[:40]})")
        if not isinstance(items[index], dict):
            raise Rejected(f"its glTF structure is broken ({kind}[{index}] is not an object)")
        return items[index]

    # ------------------------------------------------------------------------------------------ bytes and numbers

    def _uri(self, uri: str) -> bytes:
        if uri.startswith("data:"):
            try:
                return base64.b64decode(uri.partition(",")[2] + "==", validate=False)
            except binascii.Error:
                raise Rejected("its embedded base64 data is broken", "copy or download it again") from None
        return self.sidecars.read(uri)

    def _buffer(self, index: int) -> bytes:
        if index not in self._buffers:
            buffer = self._item("buffers", index)
            if "uri" in buffer:
                try:
                    self._buffers[index] = self._uri(buffer["uri"])
                except OSError:
                    raise Rejected(f"its file {buffer['uri'][:80]!r} is missing", "put it beside the .gltf") from None
            elif index == 0 and self.chunk is not None:
                self._buffers[index] = self.chunk
            else:
                raise Rejected(f"its buffer {index} has no data", "copy or download it again")
        return self._buffers[index]

    def _view(self, index: int) -> tuple[memoryview, int]:
        """The bytes of a buffer view and its stride (0: tight)."""
        view = self._item("bufferViews", index)
        start, size = _natural(view.get("byteOffset", 0)), _natural(view["byteLength"])
        buffer = self._buffer(view["buffer"])
        if start + size > len(buffer):
            raise Rejected("its binary data is shorter than its header says", "copy or download it again")
        return memoryview(buffer)[start : start + size], _natural(view.get("byteStride", 0))

    def _accessor(self, index: int) -> np.ndarray:
        """[count, columns]; normalised integers as float32 in [-1, 1]."""
        accessor = self._item("accessors", index)
        count, columns = _natural(accessor["count"]), _COLUMNS[accessor["type"]]
        dtype = np.dtype(_DTYPES[accessor["componentType"]]).newbyteorder("<")
        self.limits.check("values in one accessor", count, 3 * max(self.limits.vertices, self.limits.faces))
        if "bufferView" in accessor:
            values = self._values(accessor["bufferView"], accessor.get("byteOffset", 0), count, columns, dtype)
        else:
            values = np.zeros((count, columns), dtype)
        if (sparse := accessor.get("sparse")) is not None:
            n, places, new = _natural(sparse["count"]), sparse["indices"], sparse["values"]
            place_dtype = np.dtype(_DTYPES[places["componentType"]])
            rows = self._values(places["bufferView"], places.get("byteOffset", 0), n, 1, place_dtype)[:, 0]
            values[rows] = self._values(new["bufferView"], new.get("byteOffset", 0), n, columns, dtype)
        return _denormalised(values) if accessor.get("normalized") else values

    def _values(self, view: int, offset: int, count: int, columns: int, dtype: np.dtype) -> np.ndarray:
        data, stride = self._view(view)
        stride = stride or columns * dtype.itemsize
        offset = _natural(offset)
        if count and offset + (count - 1) * stride + columns * dtype.itemsize > len(data):
            raise Rejected("its binary data is shorter than its header says", "copy or download it again")
        return np.ndarray((count, columns), dtype, data, offset, (stride, dtype.itemsize)).copy()

    # ---------------------------------------------------------------------------------------------------- colours

    def _image(self, index: int) -> np.ndarray | None:
        """uint8 [H, W, 4], or None (and a warning) for a picture that is missing or of a format not read here."""
        if index not in self._images:
            image = self._item("images", index)
            try:
                data = self._view(image["bufferView"])[0] if "bufferView" in image else self._uri(image["uri"])
                picture = decode_image(bytes(data), self.pixels_left)
                self.pixels_left -= picture.shape[0] * picture.shape[1]
            except FileNotFoundError:
                self.warnings.append(f"the texture file {str(image['uri'])[:80]!r} is missing, so its colours are not used")
                picture = None
            except (OSError, KeyError, SyntaxError):
                self.warnings.append(f"texture {index} cannot be decoded, so its colours are not used")
                picture = None
            self._images[index] = picture
        return self._images[index]

    def _texture(self, info: dict[str, Any]) -> np.ndarray | None:
        texture = self._item("textures", info["index"])
        extensions = texture.get("extensions", {})
        for name in ("EXT_texture_webp", "EXT_texture_avif", "KHR_texture_basisu", "MSFT_texture_dds"):
            if name in extensions and (name == "EXT_texture_webp" or "source" not in texture):
                return self._image(extensions[name]["source"])
        return self._image(texture["source"]) if "source" in texture else None

    def _material(self, index: int) -> tuple[Material, dict[str, Any]]:
        """The material and its base colour texture's glTF entry, which says how to find texture coordinates."""
        if index not in self._materials:
            material = self._item("materials", index)
            base = material.get("pbrMetallicRoughness", {})
            factor, info = base.get("baseColorFactor"), base.get("baseColorTexture")
            gloss = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness", {})
            factor, info = gloss.get("diffuseFactor", factor), gloss.get("diffuseTexture", info)
            result = Material(
                np.ones(4) if factor is None else np.array(factor, np.float32),
                None if info is None else self._texture(info),
                material.get("alphaMode", "OPAQUE"),
                float(material.get("alphaCutoff", 0.5)),
            )
            self._materials[index] = result, info or {}
        return self._materials[index]

    # --------------------------------------------------------------------------------------------------- geometry

    def _primitives(self, index: int) -> list[tuple[Mesh, dict[str, np.ndarray]]]:
        """The triangle meshes of a glTF mesh in its own frame, each with its skin's JOINTS_0 and WEIGHTS_0."""
        if index not in self._meshes:
            primitives = self._item("meshes", index)["primitives"]
            self._meshes[index] = [self._primitive(p) for p in primitives if p.get("mode", 4) in (4, 5, 6)]
            if len(self._meshes[index]) < len(primitives):
                self.warnings.append("points and lines were left out")
        return self._meshes[index]

    def _primitive(self, primitive: dict[str, Any]) -> tuple[Mesh, dict[str, np.ndarray]]:
        draco = primitive.get("extensions", {}).get("KHR_draco_mesh_compression")
        found, corners = self._draco(draco) if draco else ({}, None)
        names = primitive["attributes"]
        attributes = {name: found.get(name, None) for name in names}
        for name, accessor in names.items():
            if attributes[name] is None and _is_wanted(name):
                attributes[name] = self._accessor(accessor)
            elif attributes[name] is not None and self._item("accessors", accessor).get("normalized"):
                attributes[name] = _denormalised(attributes[name])
        positions = attributes["POSITION"].astype(np.float32)
        if not np.isfinite(positions).all():
            raise Rejected("some of its coordinates are not finite numbers")
        self.limits.check("vertices", len(positions), self.limits.vertices)
        if corners is None:
            indices = primitive.get("indices")
            corners = np.arange(len(positions)) if indices is None else self._accessor(indices)[:, 0].astype(np.int64)
        faces = _faces(corners, primitive.get("mode", _TRIANGLES), len(positions))
        self.limits.check("faces", len(faces), self.limits.faces)
        material, info = self._material(primitive["material"]) if "material" in primitive else (Material(np.ones(4)), {})
        uv = None if material.texture is None else self._uv(attributes, info)
        rgba = _colors(attributes.get("COLOR_0"))
        mesh = Mesh(
            positions,
            faces,
            np.zeros(len(faces), np.int32),
            (material if uv is not None else replace(material, texture=None),),
            corner_uv=None if uv is None else uv[faces],
            corner_rgba=None if rgba is None else rgba[faces],
        )
        return mesh, {name: attributes[name] for name in ("JOINTS_0", "WEIGHTS_0") if name in attributes}

    def _draco(self, extension: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        import DracoPy

        try:
            decoded = DracoPy.decode(bytes(self._view(extension["bufferView"])[0]))
        except Exception as error:  # DracoPy has its own exception types and raises plain ones too
            raise Rejected(f"its Draco data cannot be decoded ({str(error)[:80]})", "export it without Draco") from None
        by_id = {attribute["unique_id"]: attribute["data"] for attribute in decoded.attributes}
        found = {name: by_id[i].reshape(len(by_id[i]), -1) for name, i in extension["attributes"].items() if i in by_id}
        return found, np.asarray(decoded.faces, np.int64).ravel()

    def _uv(self, attributes: dict[str, Any], info: dict[str, Any]) -> np.ndarray | None:
        """Texture coordinates [V, 2] of the base colour texture, KHR_texture_transform applied."""
        transform = info.get("extensions", {}).get("KHR_texture_transform", {})
        uv = attributes.get(f"TEXCOORD_{transform.get('texCoord', info.get('texCoord', 0))}")
        if uv is None:
            self.warnings.append("a texture has no texture coordinates, so its colours are not used")
            return None
        uv = _as_float(uv)
        cos, sin = np.cos(transform.get("rotation", 0)), np.sin(transform.get("rotation", 0))
        uv = uv * np.array(transform.get("scale", (1, 1)), np.float32)
        return uv @ np.array([[cos, -sin], [sin, cos]], np.float32) + np.array(transform.get("offset", (0, 0)), np.float32)

    # ------------------------------------------------------------------------------------------------ scene graph

    def scene(self) -> Mesh:
        placed, n_faces, n_vertices = [], 0, 0
        worlds = self._worlds()
        for node_index in self._scene_nodes(worlds):
            node = self._item("nodes", node_index)
            if "mesh" not in node:
                continue
            for mesh, influences in self._primitives(node["mesh"]):
                n_faces, n_vertices = n_faces + len(mesh.faces), n_vertices + len(mesh.vertices)
                self.limits.check("faces", n_faces, self.limits.faces)
                self.limits.check("vertices", n_vertices, self.limits.vertices)
                placed.append(self._placed(mesh, influences, node, worlds, worlds[node_index]))
        if not placed:
            raise Rejected("its scene has no triangles", "export the meshes too, as triangles")
        return merge(placed)

    def _worlds(self) -> dict[int, np.ndarray]:
        """World matrix of every node that can be reached from a root."""
        nodes = self.header.get("nodes", [])
        children = [self._item("nodes", i).get("children", []) for i in range(len(nodes))]
        roots = sorted(set(range(len(nodes))) - {child for some in children for child in some})
        worlds: dict[int, np.ndarray] = {}
        stack = [(root, np.eye(4)) for root in roots]
        while stack:
            index, parent = stack.pop()
            if index in worlds:
                raise Rejected(f"its node {index} has two parents", "export it again with a plain node tree")
            worlds[index] = parent @ _local(self._item("nodes", index))
            stack += [(child, worlds[index]) for child in children[index]]
        return worlds

    def _scene_nodes(self, worlds: dict[int, np.ndarray]) -> Iterator[int]:
        """Nodes of the default scene, or all where the file has no scene, in file order."""
        if not self.header.get("scenes"):
            yield from sorted(worlds)
            return
        stack = list(self._item("scenes", self.header.get("scene", 0)).get("nodes", []))[::-1]
        seen: set[int] = set()
        while stack:
            index = stack.pop()
            if index not in worlds or index in seen:
                raise Rejected(f"its node {str(index)[:40]} is missing, repeated or its own ancestor")
            seen.add(index)
            yield index
            stack += self._item("nodes", index).get("children", [])[::-1]

    def _placed(
        self,
        mesh: Mesh,
        influences: dict[str, np.ndarray],
        node: dict[str, Any],
        worlds: dict[int, np.ndarray],
        world: np.ndarray,
    ) -> Mesh:
        if "skin" not in node or len(influences) < 2:
            return mesh.transformed(world)
        try:
            skinned = self._skinned(mesh, influences, self._item("skins", node["skin"]), worlds)
        except _BROKEN:
            skinned = None
        if skinned is None or not np.isfinite(skinned.vertices).all():
            self.warnings.append("a skin is broken, so its mesh is placed by its node alone")
            return mesh.transformed(world)
        return skinned

    def _skinned(
        self, mesh: Mesh, influences: dict[str, np.ndarray], skin: dict[str, Any], worlds: dict[int, np.ndarray]
    ) -> Mesh:
        """The rest pose: as glTF says, the node's own transform does not count, the joints' do."""
        joints = np.array([worlds[index] for index in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self._accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).swapaxes(1, 2)
            joints = joints @ inverse[: len(joints)].astype(np.float64)
        index_V4, weight_V4 = influences["JOINTS_0"].astype(np.int64), _as_float(influences["WEIGHTS_0"]).astype(float)
        broken_V = ~(np.isfinite(weight_V4).all(axis=1) & (weight_V4.sum(axis=1) > 0))
        weight_V4[broken_V] = (1, 0, 0, 0)
        weight_V4 /= weight_V4.sum(axis=1, keepdims=True)
        vertices = np.zeros((len(mesh.vertices), 3))
        for index_V, weight_V in zip(index_V4.T, weight_V4.T):
            matrix_V44 = joints[index_V]
            moved_V3 = np.einsum("vij,vj->vi", matrix_V44[:, :3, :3], mesh.vertices) + matrix_V44[:, :3, 3]
            vertices += weight_V[:, None] * moved_V3
        return replace(mesh, vertices=vertices)


def _natural(value: Any) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number from 0, got {str(value)[:40]}")
    return value


def _is_wanted(name: str) -> bool:
    return name in ("POSITION", "COLOR_0", "JOINTS_0", "WEIGHTS_0") or name.startswith("TEXCOORD_")


def _denormalised(values: np.ndarray) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.integer):
        return values
    return np.maximum(values.astype(np.float32) / np.iinfo(values.dtype).max, -1)


def _as_float(values: np.ndarray) -> np.ndarray:
    """float32; integers that should have been marked as normalised are taken as such."""
    return _denormalised(values).astype(np.float32)


def _colors(values: np.ndarray | None) -> np.ndarray | None:
    """[V, 4] linear RGBA of a COLOR_0 attribute."""
    if values is None:
        return None
    rgba = np.ones((len(values), 4), np.float32)
    rgba[:, : values.shape[1]] = np.nan_to_num(_as_float(values))
    return rgba


def _faces(corners: np.ndarray, mode: int, n_vertices: int) -> np.ndarray:
    if corners.size and not (0 <= corners.min() and corners.max() < n_vertices):
        raise Rejected("a face names a vertex that does not exist")
    if mode == _TRIANGLES:
        return corners[: len(corners) // 3 * 3].reshape(-1, 3)
    n = max(0, len(corners) - 2)
    if mode == _FAN:
        return np.stack([corners[1 : n + 1], corners[2:], np.repeat(corners[:1], n)], axis=1)
    faces = np.stack([corners[:n], corners[1 : n + 1], corners[2:]], axis=1)
    faces[1::2] = faces[1::2, [0, 2, 1]]  # every other triangle of a strip is wound the other way
    return faces


def _local(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        matrix = np.array(node["matrix"], np.float64).reshape(4, 4).T
    else:
        x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), np.float64) / max(
            np.linalg.norm(node.get("rotation", (0, 0, 0, 1))), 1e-12
        )
        matrix = np.eye(4)
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), np.float64)
        matrix[:3, 3] = node.get("translation", (0, 0, 0))
    if not np.isfinite(matrix).all():
        raise Rejected("a node's transform is not finite")
    return matrix
