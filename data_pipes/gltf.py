"""Reads glTF 2.0 (.gltf, .glb): geometry, base colours, textures, vertex colours, scene graph, skins at rest.

Written by hand because trimesh 5.2 rounds base colour factors to 8 bits of *linear* light (dark colours visibly
shift) and passes over sparse and normalised accessors, other texture coordinate sets than the first, triangle fans
and skins. Every value in the file is taken as hostile: whatever is of a wrong type or out of range ends in `Rejected`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .gltf_data import BROKEN, GltfData, as_float, denormalised
from .limits import ANIMATED, Limits, Rejected, Sidecars, decode_image
from .mesh import WHITE, Material, Mesh, merge

__all__ = ["read_gltf"]

_TRIANGLES, _STRIP, _FAN = _WITH_FACES = 4, 5, 6
_UNREADABLE = {"EXT_meshopt_compression": "meshopt", "KHR_meshopt_compression": "meshopt"}


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
    except BROKEN as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Rejected(f"its glTF structure is broken ({what})") from error


class _Reader:
    def __init__(self, data: bytes, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> None:
        self.data, self.limits, self.warnings = GltfData(data, sidecars, limits), limits, warnings
        self.pixels_left = limits.texture_pixels
        self._images: dict[int, np.ndarray | None] = {}
        self._materials: dict[int, tuple[Material, dict]] = {}
        self._meshes: dict[int, list[tuple[Mesh, dict[str, np.ndarray]]]] = {}
        self._check_header()

    def _check_header(self) -> None:
        version = str(self.data.header["asset"].get("version", "2.0"))
        if not version.startswith("2"):
            raise Rejected(f"it is glTF version {version[:20]}", "convert it to glTF 2.0")
        for name in self.data.header.get("extensionsRequired", []):
            if name in _UNREADABLE:
                raise Rejected(f"it is compressed with {_UNREADABLE[name]} ({name})", "export it without compression")
        self.limits.check("nodes", len(self.data.header.get("nodes", [])), self.limits.nodes)

    # ---------------------------------------------------------------------------------------------------- colours

    def _image(self, index: int) -> np.ndarray | None:
        """uint8 [H, W, 4], or None (and a warning) for a picture that is missing or of a format not read here."""
        if index not in self._images:
            image = self.data.item("images", index)
            try:
                data = self.data.view(image["bufferView"])[0] if "bufferView" in image else self.data.uri(image["uri"])
                picture = decode_image(bytes(data), self.pixels_left)
                self.pixels_left -= picture.shape[0] * picture.shape[1]
            except FileNotFoundError:
                name = str(image["uri"])[:80]
                self.warnings.append(f"the texture file {name!r} is missing, so its colours are not used")
                picture = None
            except (OSError, KeyError, SyntaxError):
                self.warnings.append(f"texture {index} cannot be decoded, so its colours are not used")
                picture = None
            self._images[index] = picture
        return self._images[index]

    def _texture(self, info: dict[str, Any]) -> np.ndarray | None:
        texture = self.data.item("textures", info["index"])
        extensions = texture.get("extensions", {})
        for name in ("EXT_texture_webp", "EXT_texture_avif", "KHR_texture_basisu", "MSFT_texture_dds"):
            if name in extensions and (name == "EXT_texture_webp" or "source" not in texture):
                return self._image(extensions[name]["source"])
        return self._image(texture["source"]) if "source" in texture else None

    def _material(self, index: int | None) -> tuple[Material, dict[str, Any]]:
        """The material and its base colour texture's glTF entry, which says how to find texture coordinates."""
        if index is None:
            return WHITE, {}
        if index not in self._materials:
            material = self.data.item("materials", index)
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
            primitives = self.data.item("meshes", index)["primitives"]
            self._meshes[index] = [self._primitive(p) for p in primitives if p.get("mode", _TRIANGLES) in _WITH_FACES]
            if len(self._meshes[index]) < len(primitives):
                self.warnings.append("points and lines were left out")
        return self._meshes[index]

    def _primitive(self, primitive: dict[str, Any]) -> tuple[Mesh, dict[str, np.ndarray]]:
        draco = primitive.get("extensions", {}).get("KHR_draco_mesh_compression")
        found, corners = self._draco(draco) if draco else ({}, None)
        names = primitive["attributes"]
        attributes: dict[str, np.ndarray] = {}
        for name, accessor in names.items():
            if name in found:
                normalised = self.data.item("accessors", accessor).get("normalized")
                attributes[name] = denormalised(found[name]) if normalised else found[name]
            elif _is_wanted(name):
                attributes[name] = self.data.accessor(accessor)
        positions = attributes["POSITION"].astype(np.float32)
        if not np.isfinite(positions).all():
            raise Rejected("some of its coordinates are not finite numbers", kind="not finite")
        self.limits.check("vertices", len(positions), self.limits.vertices)
        if corners is None:
            indices = primitive.get("indices")
            corners = (
                np.arange(len(positions)) if indices is None else self.data.accessor(indices)[:, 0].astype(np.int64)
            )
        faces = _faces(corners, primitive.get("mode", _TRIANGLES), len(positions))
        self.limits.check("faces", len(faces), self.limits.faces)
        material, info = self._material(primitive.get("material"))
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
            decoded = DracoPy.decode(bytes(self.data.view(extension["bufferView"])[0]))
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
        uv = as_float(uv)
        cos, sin = np.cos(transform.get("rotation", 0)), np.sin(transform.get("rotation", 0))
        scale, offset = (np.array(transform.get(k, v), np.float32) for k, v in (("scale", (1, 1)), ("offset", (0, 0))))
        return (uv * scale) @ np.array([[cos, -sin], [sin, cos]], np.float32) + offset

    # ------------------------------------------------------------------------------------------------ scene graph

    def scene(self) -> Mesh:
        placed, n_faces, n_vertices = [], 0, 0
        worlds = self._worlds()
        for node_index in self._scene_nodes(worlds):
            node = self.data.item("nodes", node_index)
            if "mesh" not in node:
                continue
            for mesh, influences in self._primitives(node["mesh"]):
                n_faces, n_vertices = n_faces + len(mesh.faces), n_vertices + len(mesh.vertices)
                self.limits.check("faces", n_faces, self.limits.faces)
                self.limits.check("vertices", n_vertices, self.limits.vertices)
                placed.append(self._placed(mesh, influences, node, worlds, worlds[node_index]))
        if not placed:
            raise Rejected("its scene has no triangles", "export the meshes too, as triangles", kind="empty")
        animations = self.data.header.get("animations")
        if isinstance(animations, list) and any(isinstance(one, dict) and one.get("channels") for one in animations):
            self.warnings.append(ANIMATED)
        return merge(placed)

    def _worlds(self) -> dict[int, np.ndarray]:
        """World matrix of every node that can be reached from a root."""
        nodes = self.data.header.get("nodes", [])
        children = [self.data.item("nodes", i).get("children", []) for i in range(len(nodes))]
        roots = sorted(set(range(len(nodes))) - {child for some in children for child in some})
        worlds: dict[int, np.ndarray] = {}
        stack = [(root, np.eye(4)) for root in roots]
        while stack:
            index, parent = stack.pop()
            if index in worlds:
                raise Rejected(f"its node {index} has two parents", "export it again with a plain node tree")
            worlds[index] = parent @ _local(self.data.item("nodes", index))
            stack += [(child, worlds[index]) for child in children[index]]
        return worlds

    def _scene_nodes(self, worlds: dict[int, np.ndarray]) -> Iterator[int]:
        """Nodes of the default scene, or all where the file has no scene, in file order."""
        if not self.data.header.get("scenes"):
            yield from sorted(worlds)
            return
        stack = list(self.data.item("scenes", self.data.header.get("scene", 0)).get("nodes", []))[::-1]
        seen: set[int] = set()
        while stack:
            index = stack.pop()
            if index not in worlds or index in seen:
                raise Rejected(f"its node {str(index)[:40]} is missing, repeated or its own ancestor")
            seen.add(index)
            yield index
            stack += self.data.item("nodes", index).get("children", [])[::-1]

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
            skinned = self._skinned(mesh, influences, self.data.item("skins", node["skin"]), worlds)
        except BROKEN:
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
            inverse = self.data.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).swapaxes(1, 2)
            joints = joints @ inverse[: len(joints)].astype(np.float64)
        index_V4, weight_V4 = influences["JOINTS_0"].astype(np.int64), as_float(influences["WEIGHTS_0"]).astype(float)
        broken_V = ~(np.isfinite(weight_V4).all(axis=1) & (weight_V4.sum(axis=1) > 0))
        weight_V4[broken_V] = (1, 0, 0, 0)
        weight_V4 /= weight_V4.sum(axis=1, keepdims=True)
        vertices = np.zeros((len(mesh.vertices), 3))
        for index_V, weight_V in zip(index_V4.T, weight_V4.T):
            matrix_V44 = joints[index_V]
            moved_V3 = np.einsum("vij,vj->vi", matrix_V44[:, :3, :3], mesh.vertices) + matrix_V44[:, :3, 3]
            vertices += weight_V[:, None] * moved_V3
        return replace(mesh, vertices=vertices)


def _is_wanted(name: str) -> bool:
    return name in ("POSITION", "COLOR_0", "JOINTS_0", "WEIGHTS_0") or name.startswith("TEXCOORD_")


def _colors(values: np.ndarray | None) -> np.ndarray | None:
    """[V, 4] linear RGBA of a COLOR_0 attribute."""
    if values is None:
        return None
    rgba = np.ones((len(values), 4), np.float32)
    rgba[:, : values.shape[1]] = np.nan_to_num(as_float(values))
    return rgba


def _faces(corners: np.ndarray, mode: int, n_vertices: int) -> np.ndarray:
    if corners.size and not (corners.min() >= 0 and corners.max() < n_vertices):
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
        rotation_4 = np.array(node.get("rotation", (0, 0, 0, 1)), np.float64)
        x, y, z, w = rotation_4 / max(float(np.linalg.norm(rotation_4)), 1e-12)
        matrix = np.eye(4)
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), np.float64)
        matrix[:3, 3] = node.get("translation", (0, 0, 0))
    if not np.isfinite(matrix).all():
        raise Rejected("a node's transform is not finite", kind="not finite")
    return matrix
