"""Finds the 3D files of a folder and of the archives in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..progress import Bar
from .archives import ARCHIVE_SUFFIXES, ArchiveLimits, unpack
from .limits import Rejected
from .read import SUFFIXES
from .workers import Failed, isolated_map

__all__ = ["Place", "find"]

UNPACK_CPU_S, UNPACK_WALL_S, UNPACK_BYTES = 3600, 36000.0, 2 << 30  # for one archive; it is written piece by piece


@dataclass(frozen=True)
class Place:
    """Where a 3D file is, and the folder in which the files that it names must lie.

    refused: for an archive that stands for itself, because nothing could be taken from it.
    """

    path: Path
    root: Path
    refused: Rejected | None = None
    fetch = None

    @property
    def stamp(self):
        s = self.path.stat()
        return [s.st_size, s.st_mtime_ns]

    def sidecar_stamp(self, name):
        import os
        try:
            s = os.stat(self.path.parent / name)
            return [s.st_size, s.st_mtime_ns]
        except OSError:
            return None

    def local(self, limits=None):
        import contextlib
        return contextlib.nullcontext((self.path, self.root))


def find(folder: Path, leave_out: Path | None, scratch: Path, archives: ArchiveLimits | None = None) -> dict[str, Place]:
    """3D files under a folder by name, sorted: relative with "/", and ARCHIVE/inner/file for what an archive holds.

    Args:
        leave_out: a folder that is not looked into; neither are hidden ones, nor archives in archives.
        scratch: an empty folder, which archives are unpacked into, in a process that may die of them.
    Raises: UserError if there is no such folder, or nothing in it.
    """
    if not folder.exists():
        raise UserError(f"the folder {folder} does not exist")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder of 3D files: give the folder that it is in")
    places = {name: Place(folder / name, folder) for name in _walk(folder, leave_out, SUFFIXES)}
    packed = _walk(folder, leave_out, ARCHIVE_SUFFIXES)
    jobs = [(folder / name, scratch / str(k), archives or ArchiveLimits()) for k, name in enumerate(packed)]
    outcomes = isolated_map(
        _unpack, jobs, workers=1, cpu_s=UNPACK_CPU_S, wall_s=UNPACK_WALL_S, memory_bytes=UNPACK_BYTES
    )
    with Bar(len(packed), "unpacking", quiet=not packed) as bar:
        for name, (path, root, _), refused in zip(packed, jobs, outcomes):
            if isinstance(refused, Failed):
                refused = Rejected(refused.reason, "unpack it yourself, or leave it out")
            inner = [] if refused else _walk(root, leave_out, SUFFIXES)
            if not inner:
                places[name] = Place(path, folder, refused or Rejected("it holds no 3D files", "leave it out"))
            places |= {f"{name}/{file}": Place(root / file, root) for file in inner}
            bar.update(1)
    if not places:
        raise UserError(f"the folder {folder} has no 3D files: put {', '.join(SUFFIXES)} files into it")
    return dict(sorted(places.items()))


def _walk(folder: Path, leave_out: Path | None, suffixes: Sequence[str]) -> list[str]:
    leave_out = leave_out and leave_out.resolve()
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() != leave_out
        ]
        files += [
            (Path(place) / name).relative_to(folder).as_posix()
            for name in names
            if not name.startswith(".") and name.lower().endswith(tuple(suffixes))
        ]
    return sorted(files)


def _unpack(job: tuple[Path, Path, ArchiveLimits]) -> Rejected | None:
    """Runs in a worker."""
    try:
        unpack(*job)
    except Rejected as rejected:
        return rejected
    return None
