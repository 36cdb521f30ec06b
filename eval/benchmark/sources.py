"""Where one object of the benchmark comes from: a mesh file, ready renders, a sample of raw shards, a control.

A source is small and can be sent to a worker process, which loads it there. It imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import trimesh

from ...data_pipes.limits import Limits, Rejected, Sidecars
from ...data_pipes.mesh import Mesh
from ...data_pipes.read import read_mesh
from ...data_pipes.shard_folder import ShardFolder
from ...errors import UserError
from ...files import sha256_file
from ..picture_files import open_picture
from ..stored import exact_mesh, frontal_pictures

__all__ = [
    "Blank",
    "GreySphere",
    "Loaded",
    "MeshFile",
    "Picture",
    "Reading",
    "Renders",
    "Source",
    "StoredObject",
    "StoredPicture",
    "Unusable",
]

Up = Literal["y", "z"]
MOST_HEADER = 64 << 20
Z_UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], np.float64)  # +Z to +Y, +Y to -Z


@dataclass(frozen=True)
class Loaded:
    """A mesh in its own frame, or finished pictures u8 [V, H, W, 3] by shading."""

    mesh: Mesh | None = None
    pictures: dict[str, np.ndarray] | None = None


@dataclass
class Reading:
    """What came to light while an object was read, also where it could not be: sha256 of the files that it names (None
    for one that is not there), and what was left out of it."""

    sidecars: dict[str, str | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Source(Protocol):
    def key(self) -> dict[str, Any]:
        """What its pixels depend on, besides the protocol and the content of the files that a mesh file names.

        Raises OSError for a file that is none or cannot be read.
        """
        ...

    def load(self, reading: Reading | None = None) -> Loaded:
        """Raises Rejected (or another UserError) for an object that cannot be used."""
        ...


@dataclass(frozen=True)
class MeshFile:
    """A GLB, glTF, OBJ, OFF, PLY or STL file. up: the axis that points up in it; z is turned to y (x stays)."""

    path: str
    up: Up = "y"

    def key(self) -> dict[str, Any]:
        path = Path(self.path)
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError(errno.ENOENT, "it is not a file", self.path)
        key = {"mesh": sha256_file(path), "suffix": path.suffix.lower(), "up": self.up}
        # Two files of equal bytes may name different textures, each in its own folder.
        return key if _stands_alone(path) else {**key, "folder": str(path.parent.resolve())}

    def load(self, reading: Reading | None = None) -> Loaded:
        reading = reading or Reading()
        mesh = read_mesh(self.path, sidecars=reading.sidecars, warnings=reading.warnings)
        return Loaded(mesh.transformed(Z_UP) if self.up == "z" else mesh)

    def sidecars_now(self, names: Iterable[str]) -> dict[str, str | None]:
        """sha256 of the named files as they are now; None for one that is not there."""
        beside = Sidecars(Path(self.path), None, Limits())
        for name in names:
            with contextlib.suppress(FileNotFoundError, Rejected):
                beside.read(name)
        return beside.hashes


@dataclass(frozen=True)
class Renders:
    """Finished pictures of one object by the protocol's cameras, in their order. size: height and width they must have.

    shadings: paths by shading; all have as many.
    """

    shadings: tuple[tuple[str, tuple[str, ...]], ...]
    size: int

    def key(self) -> dict[str, Any]:
        return {"renders": {name: [sha256_file(path) for path in paths] for name, paths in self.shadings}}

    def load(self, reading: Reading | None = None) -> Loaded:
        return Loaded(pictures={name: np.stack([self._one(path) for path in paths]) for name, paths in self.shadings})

    def _one(self, path: str) -> np.ndarray:
        picture = open_picture(path)
        if picture.size != (self.size, self.size):
            width, height = picture.size
            raise UserError(
                f"{path} is {width} x {height} pixels, the protocol's pictures are {self.size} x {self.size}: render "
                "it at that size, or give the mesh"
            )
        return np.asarray(picture)


@dataclass(frozen=True)
class Unusable:
    """An object that is there and cannot be scored. reason: one sentence."""

    path: str
    reason: str

    def key(self) -> dict[str, Any]:
        return {"unusable": self.path, "reason": self.reason}

    def load(self, reading: Reading | None = None) -> Loaded:
        raise Rejected(self.reason, "make it again")


@dataclass(frozen=True)
class Picture:
    """One picture of any size, such as what an object was made from; padded to a square on white and resized."""

    path: str

    def key(self) -> dict[str, Any]:
        return {"picture": sha256_file(self.path)}

    def load(self, reading: Reading | None = None) -> Loaded:
        return Loaded(pictures={"colour": np.asarray(open_picture(self.path))[None]})


@dataclass(frozen=True)
class StoredObject:
    """A sample of raw shards: its exact mesh (procedural samples), else its stored frontal views but the first.

    The first is what image conditioning is asked about, and must not stand for the object itself.
    """

    folder: str
    folder_hash: str
    uid: str
    exact: bool

    def key(self) -> dict[str, Any]:
        return {"stored": self.folder_hash, "uid": self.uid, "exact": self.exact}

    def load(self, reading: Reading | None = None) -> Loaded:
        shards = _opened(self.folder)
        if self.exact:
            return Loaded(exact_mesh(shards, self.uid, shards.read_json(self.uid)))
        views = frontal_pictures(shards, self.uid)
        return Loaded(pictures={"colour": views[1:] if len(views) > 1 else views})


@dataclass(frozen=True)
class StoredPicture:
    """The first stored frontal view of a sample of raw shards."""

    folder: str
    folder_hash: str
    uid: str

    def key(self) -> dict[str, Any]:
        return {"stored picture": self.folder_hash, "uid": self.uid}

    def load(self, reading: Reading | None = None) -> Loaded:
        return Loaded(pictures={"colour": frontal_pictures(_opened(self.folder), self.uid, first_only=True)})


@dataclass(frozen=True)
class Blank:
    """Nothing at all: the background. Shows an evaluator that favours one caption."""

    def key(self) -> dict[str, Any]:
        return {"control": "blank"}

    def load(self, reading: Reading | None = None) -> Loaded:
        return Loaded(Mesh.from_vertex_colors(np.zeros((0, 3)), np.zeros((0, 3), np.int32), np.zeros((0, 3))))


@dataclass(frozen=True)
class GreySphere:
    """A grey ball of radius .9."""

    def key(self) -> dict[str, Any]:
        return {"control": "grey sphere"}

    def load(self, reading: Reading | None = None) -> Loaded:
        ball = trimesh.creation.icosphere(subdivisions=4, radius=0.9)
        vertices_V3 = np.asarray(ball.vertices, np.float32)
        grey_V3 = np.full_like(vertices_V3, 0.5)
        return Loaded(Mesh.from_vertex_colors(vertices_V3, np.asarray(ball.faces, np.int32), grey_V3))


def _stands_alone(path: Path) -> bool:
    """Whether a mesh file can name no other: STL and OFF cannot, a GLB does by a "uri" alone."""
    if path.suffix.lower() in (".stl", ".off"):
        return True
    if path.suffix.lower() != ".glb":
        return False
    with open(path, "rb") as file:
        head = file.read(20)
        return b'"uri"' not in file.read(min(int.from_bytes(head[12:16], "little"), MOST_HEADER))


@lru_cache(maxsize=4)
def _opened(folder: str) -> ShardFolder:
    """A worker reads many samples of one folder."""
    return ShardFolder(folder)
