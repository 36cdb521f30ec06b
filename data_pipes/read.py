"""Reads a 3D file from outside into one coloured mesh.

glTF by `gltf.py`, 3MF by `threemf.py`, COLLADA by `collada.py`, USD by `usd.py`; OBJ, OFF, PLY and STL by trimesh.

Every file is taken as hostile. What a reader cannot bound from within (time, memory, a crash in a native library) is
bounded by the worker process that calls it (`build.py`).
"""

from __future__ import annotations

import contextlib
import io
import warnings as python_warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from trimesh.resolvers import Resolver

from .collada import read_collada
from .gltf import read_gltf
from .limits import Fetch, Limits, Rejected, Sidecars
from .mesh import Material, Mesh, merge, srgb_to_linear
from .threemf import read_3mf

__all__ = ["SUFFIXES", "Limits", "Rejected", "read_mesh"]

VERSION = 1  # of what meshes come out: it changes with anything that changes them, so that no cache outlives it
USD_SUFFIXES = (".usd", ".usda", ".usdc", ".usdz")
SUFFIXES = (".3mf", ".dae", ".glb", ".gltf", ".obj", ".off", ".ply", ".stl", *USD_SUFFIXES)


def read_mesh(
    path: str | Path,
    limits: Limits | None = None,
    *,
    root: str | Path | None = None,
    warnings: list[str] | None = None,
    sidecars: dict[str, str | None] | None = None,
    fetch: Fetch | None = None,
) -> Mesh:
    """Read a 3MF, COLLADA (.dae), GLB, glTF, OBJ, OFF, PLY, STL or USD file.

    Args:
        limits: on sizes; more is refused before it is decoded where the format allows.
        root: files that it names (textures, buffers) must lie in here; its own folder by default.
        warnings: gets a sentence for everything that was left out but does not spoil the mesh.
        sidecars: gets name and sha256 of every file that it names, None for one that is not there.
        fetch: asked for files inside `root` that it names and that are not on the disk (see places.py).
    Returns: all triangles of the file's scene, at rest where it is animated. Formats that say what is up and how long
        a unit is (3MF, COLLADA, glTF, USD) come out +Y up and in metres, the others in the file's own frame and units.
    Raises: Rejected, with a reason and a hint.
    """
    path = Path(path)
    limits = limits or Limits()
    warnings = [] if warnings is None else warnings
    data = _bytes(path, limits)
    beside = Sidecars(path, None if root is None else Path(root), limits, fetch)
    if sidecars is not None:
        beside.hashes = sidecars
    suffix = path.suffix.lower()
    # Numbers too large for float32 are found where the result is checked; NumPy's word on them is no use to anybody.
    with np.errstate(over="ignore", invalid="ignore"):
        if suffix in (".glb", ".gltf"):
            mesh = read_gltf(data, beside, limits, warnings)
        elif suffix == ".dae":
            mesh = read_collada(data, beside, limits, warnings)
        elif suffix == ".3mf":
            mesh = read_3mf(data, limits, warnings)
        elif suffix in USD_SUFFIXES:
            mesh = _read_usd(data, suffix, beside, limits, warnings)
        elif suffix in SUFFIXES:
            mesh = _read_by_trimesh(data, suffix[1:], beside, limits, warnings)
        else:
            what = suffix or "a file without suffix"
            raise Rejected(f"{what} is not a format read here", "convert it to .glb")
        return _checked(mesh, limits)


def _bytes(path: Path, limits: Limits) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise Rejected("it is not a file", "leave it out")
        if size == 0:
            raise Rejected("it is empty", "copy or download it again")
        limits.check("bytes", size, limits.file_bytes)
        data = path.read_bytes()
    except OSError as error:
        raise Rejected(f"it cannot be read ({error.strerror or error})", "check that it may be read") from None
    if data.startswith(b"version https://git-lfs"):
        raise Rejected("it is a Git LFS pointer, not the file itself", "run `git lfs pull`")
    return data


def _checked(mesh: Mesh, limits: Limits) -> Mesh:
    limits.check("vertices", len(mesh.vertices), limits.vertices)
    limits.check("faces", len(mesh.faces), limits.faces)
    if not len(mesh.faces):
        raise Rejected("it has no triangles", "export the meshes too, as triangles", kind="empty")
    if not mesh.face_areas.sum() > 0:
        raise Rejected(
            "all its triangles are without area", "check its scale; coordinates may be lost in rounding", kind="empty"
        )
    return mesh


def _read_usd(data: bytes, suffix: str, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> Mesh:
    try:
        from .usd import read_usd  # its library is large, and an extra
    except ImportError:
        raise Rejected("it needs the USD library, which is not installed", "pip install 'shapeloom[usd]'") from None
    return read_usd(data, suffix, sidecars, limits, warnings)


# ------------------------------------------------------------------------------------------------- OBJ, PLY, STL


def _read_by_trimesh(data: bytes, kind: str, sidecars: Sidecars, limits: Limits, warnings: list[str]) -> Mesh:
    if kind == "obj":
        data = _utf8(data)
    if kind == "stl":
        _check_stl(data, limits)
    try:
        with _silent_trimesh():
            loaded = trimesh.load_scene(
                io.BytesIO(data), file_type=kind, resolver=_resolver(sidecars, warnings), process=False
            )
            parts = [part for part in loaded.dump() if isinstance(part, trimesh.Trimesh) and len(part.faces)]
            return _merged(parts, limits, warnings)
    except Rejected:
        raise
    except MemoryError:
        raise Rejected("it needs more memory than allowed", "simplify it or leave it out") from None
    except Exception as error:  # trimesh raises whatever its parsers meet, and passes on arrays of any shape
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise Rejected(f"its {kind.upper()} data cannot be read ({what})") from error


@contextlib.contextmanager
def _silent_trimesh() -> Iterator[None]:
    """Without what trimesh warns of and logs, tracebacks among it: what matters is said by an exception."""
    logger = trimesh.util.log
    before, logger.disabled = logger.disabled, True
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _merged(parts: list[Any], limits: Limits, warnings: list[str]) -> Mesh:
    """trimesh geometries as one mesh."""
    if not parts:
        raise Rejected("it has no triangles", "export the meshes too, as triangles", kind="empty")
    textures: dict[int, Material] = {}
    pixels_left = limits.texture_pixels
    meshes = []
    for part in parts:
        mesh, pixels_left = _from_trimesh(part, textures, pixels_left, warnings)
        meshes.append(mesh)
    return merge(meshes)


def _utf8(data: bytes) -> bytes:
    """Text as UTF-8 with plain line ends, whatever byte order mark it carries."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            data = data.decode(encoding, "replace").encode()
    return data.replace(b"\r\n", b"\n")


def _check_stl(data: bytes, limits: Limits) -> None:
    """A binary STL says how many triangles follow; a wrong number means a cut or forged file."""
    if data[:5].lower() == b"solid" and (b"facet" in data[:1000] or b"endsolid" in data[:1000].lower()):
        return
    if len(data) < 84:
        raise Rejected("it is neither an ASCII nor a binary STL", "copy or download it again")
    n_faces = int.from_bytes(data[80:84], "little")
    if 84 + 50 * n_faces > len(data):
        raise Rejected(
            f"its header says {n_faces:,} triangles but it has bytes for {(len(data) - 84) // 50:,}",
            "copy or download it again",
        )
    limits.check("faces", n_faces, limits.faces)


def _resolver(sidecars: Sidecars, warnings: list[str]) -> Any:
    """What trimesh asks for material and texture files."""

    class _Resolver(Resolver):
        def __init__(self) -> None:
            pass

        def get(self, name: str) -> bytes:
            try:
                return sidecars.read(str(name))
            except FileNotFoundError:
                warnings.append(f"the file {str(name)[:80]!r} is missing, so its colours are not used")
                raise

        def namespaced(self, namespace: str) -> Resolver:
            return self

        def keys(self) -> list[str]:
            return []

        def write(self, name: str, data: bytes) -> None:
            raise PermissionError("reading only")

    return _Resolver()


def _from_trimesh(part: Any, textures: dict[int, Material], pixels_left: int, warnings: list[str]) -> tuple[Mesh, int]:
    """One trimesh geometry; its colours are sRGB, its texture coordinates grow upwards."""
    vertices, faces = np.asarray(part.vertices), np.asarray(part.faces)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise Rejected("a face names a vertex that does not exist")
    used = vertices[np.unique(faces)]
    if not np.isfinite(used.astype(np.float32)).all():
        raise Rejected("some of its coordinates are not finite numbers", kind="not finite")
    vertices = np.nan_to_num(vertices, nan=0.0, posinf=0.0, neginf=0.0)
    visual = part.visual
    corner_rgba = corner_uv = None
    material = Material(np.ones(4))
    if visual.kind == "vertex":
        corner_rgba = _linear_rgba(np.asarray(visual.vertex_colors))[faces]
    elif visual.kind == "face":
        corner_rgba = np.repeat(_linear_rgba(np.asarray(visual.face_colors))[:, None], 3, axis=1)
    elif visual.kind == "texture":
        if id(visual.material) not in textures:
            textures[id(visual.material)], pixels_left = _material(visual.material, pixels_left, warnings)
        material = textures[id(visual.material)]
        uv = getattr(visual, "uv", None)
        if uv is not None and len(uv) == len(vertices):
            corner_uv = np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1)[faces]
        vertex_color = visual.vertex_attributes.get("color") if len(visual.vertex_attributes) else None
        if vertex_color is not None and len(vertex_color) == len(vertices):
            corner_rgba = _linear_rgba(np.asarray(vertex_color))[faces]
    if corner_uv is None and material.texture is not None:
        warnings.append("a texture has no texture coordinates, so its colours are not used")
        material = Material(material.base_color_linear)
    mesh = Mesh(vertices, faces, np.zeros(len(faces), np.int32), (material,), corner_uv, corner_rgba)
    return mesh, pixels_left


def _linear_rgba(rgba: np.ndarray) -> np.ndarray:
    """sRGB colours [N, 3 or 4], uint8 or floats in [0, 1], as linear RGBA; alpha is not used by these formats."""
    linear = np.ones((len(rgba), 4), np.float32)
    linear[:, :3] = srgb_to_linear(rgba[:, :3])
    return linear


def _material(material: Any, pixels_left: int, warnings: list[str]) -> tuple[Material, int]:
    """A trimesh material (MTL or PBR); MTL's diffuse colour is taken as sRGB."""
    color = getattr(material, "diffuse", None)
    if color is None:
        color = getattr(material, "baseColorFactor", None)
    image = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    base = np.ones(4, np.float32) if color is None else _linear_rgba(np.asarray(color)[None])[0]
    if image is None:
        return Material(base), pixels_left
    try:
        if image.width * image.height > pixels_left:
            raise Rejected(f"its textures are too large ({image.width} x {image.height})", "make the textures smaller")
        texture = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError):
        warnings.append("a texture cannot be decoded, so its colours are not used")
        return Material(base), pixels_left
    # Exporters write a diffuse colour of black or grey beside a texture and mean the texture alone.
    return Material(np.ones(4), texture), pixels_left - image.width * image.height
