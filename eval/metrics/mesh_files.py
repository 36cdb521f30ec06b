"""Folders of mesh files to be scored, and how an object is looked at.

This module imports no torch: it is also what the processes load that read the files.

Shapes: V views, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...data_pipes.mesh import Mesh
from ...data_pipes.read import SUFFIXES
from ...data_pipes.render import composite, render
from ...errors import UserError
from ...files import sha256_file, sha256_json
from ...models.cameras import orbit

__all__ = ["ORBIT_WORDS", "files_hash", "mesh_files", "orbit_pictures"]

AZIMUTHS_DEG, ELEVATION_DEG = tuple(range(0, 360, 45)), 20.0
ORBIT_WORDS = "8 views, every 45 degrees from the front, elevation 20, distance 4, field of view 40, lit, on white"


def mesh_files(folder: str | Path, option: str) -> list[Path]:
    """The mesh files that lie in a folder itself, by name; hidden ones are left out.

    Args:
        option: by which the user gave the folder, for the message.
    Raises: UserError for what is no folder, or holds no mesh file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{option} {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        raise UserError(f"{option} {folder} has no mesh files: put {', '.join(SUFFIXES)} files into the folder itself")
    return sorted(files)


def files_hash(files: list[Path]) -> str:
    """sha256 of the files' names and bytes."""
    return sha256_json({path.name: sha256_file(path) for path in files})


def orbit_pictures(mesh: Mesh | None, size: int) -> np.ndarray:
    """An object from all around (`ORBIT_WORDS`), u8 [V, H, W, 3]; white where there is none.

    Args:
        mesh: in the normalised object frame.
        size: height and width in pixels.
    """
    cameras = orbit(list(AZIMUTHS_DEG), ELEVATION_DEG, size=size)
    if mesh is None:
        return np.full((len(cameras), size, size, 3), 255, np.uint8)
    return composite(render(mesh, cameras).lit)
