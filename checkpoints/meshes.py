"""Generated meshes as GLB files.

Written here and not through trimesh because it rounds vertex colours to 8 bits of linear light, which merges the dark
ones, and leaves the material out, which viewers then take for polished metal.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from ..files import write_atomic
from ..models.mesh import ExtractedMesh

__all__ = ["write_empty_glb", "write_glb"]

FLOAT, UINT16, UINT32 = 5126, 5123, 5125
MATTE = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.9}}


def write_glb(path: str | Path, mesh: ExtractedMesh) -> None:
    """Write vertex-coloured triangles as binary glTF 2.0, in its frame (+Y up, front +Z).

    COLOR_0 is linear light by the standard (§3.7.2.1), so the sRGB colours are decoded, into 16 bits.

    Raises: ValueError for a mesh without faces.
    """
    if mesh.empty:
        raise ValueError(f"{path}: there is no surface to write")
    arrays = [
        (mesh.faces.astype("<u4").reshape(-1), "SCALAR", UINT32, 34963),
        (mesh.vertices.astype("<f4"), "VEC3", FLOAT, 34962),
        (_vertex_normals(mesh).astype("<f4"), "VEC3", FLOAT, 34962),
        (_linear_u16(mesh.rgb), "VEC4", UINT16, 34962),
    ]
    views, accessors, chunks, offset = [], [], [], 0
    for index, (array, kind, component, target) in enumerate(arrays):
        data = array.tobytes()
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(data), "target": target})
        accessors.append({"bufferView": index, "componentType": component, "count": len(array), "type": kind})
        chunks.append(data)
        offset += len(data)
    accessors[1] |= {"min": mesh.vertices.min(0).tolist(), "max": mesh.vertices.max(0).tolist()}
    accessors[3] |= {"normalized": True}
    primitive = {"attributes": {"POSITION": 1, "NORMAL": 2, "COLOR_0": 3}, "indices": 0, "material": 0}
    tree = {
        "asset": {"version": "2.0", "generator": "shapeloom"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [MATTE],
        "buffers": [{"byteLength": offset}],
        "bufferViews": views,
        "accessors": accessors,
    }
    write_atomic(path, _container(json.dumps(tree).encode(), b"".join(chunks)))


def write_empty_glb(path: str | Path) -> None:
    """Write a scene without an object: what stands for a generation that came to nothing."""
    tree = {"asset": {"version": "2.0", "generator": "shapeloom"}, "scene": 0, "scenes": [{}]}
    write_atomic(path, _container(json.dumps(tree).encode(), b""))


def _container(tree: bytes, buffer: bytes) -> bytes:
    """The GLB file of a JSON chunk and, if there is any, a binary one (glTF 2.0 §4.4)."""
    chunks = [_chunk(b"JSON", tree, b" ")] + ([_chunk(b"BIN\0", buffer, b"\0")] if buffer else [])
    return struct.pack("<4sII", b"glTF", 2, 12 + sum(map(len, chunks))) + b"".join(chunks)


def _chunk(kind: bytes, data: bytes, padding: bytes) -> bytes:
    data += padding * (-len(data) % 4)
    return struct.pack("<I4s", len(data), kind) + data


def _vertex_normals(mesh: ExtractedMesh) -> np.ndarray:
    """Unit normals, the area-weighted mean of the faces around each vertex."""
    corners_F33 = mesh.vertices[mesh.faces]
    area_F3 = np.cross(corners_F33[:, 1] - corners_F33[:, 0], corners_F33[:, 2] - corners_F33[:, 0])
    normals_V3 = np.zeros_like(mesh.vertices)
    for corner in range(3):
        np.add.at(normals_V3, mesh.faces[:, corner], area_F3)
    length_V1 = np.linalg.norm(normals_V3, axis=-1, keepdims=True)
    return np.where(length_V1 > 0, normals_V3 / np.maximum(length_V1, 1e-20), [0.0, 1.0, 0.0])


def _linear_u16(rgb_V3: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear RGBA, 16 bits."""
    linear_V3 = np.where(rgb_V3 <= 0.04045, rgb_V3 / 12.92, ((rgb_V3 + 0.055) / 1.055) ** 2.4)
    rgba_V4 = np.pad(linear_V3, ((0, 0), (0, 1)), constant_values=1.0)
    return np.round(rgba_V4 * 65535).astype("<u2")
