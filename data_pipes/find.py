"""Finds the 3D files of a folder, here or at a URL, and of the archives in it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import UserError
from ..progress import Bar
from .archives import ARCHIVE_SUFFIXES, ArchiveLimits, unpack
from .limits import Limits, Rejected
from .places import Folder, LocalFolder, Place, Stamp, walk
from .read import SUFFIXES
from .remote_files import found_at, is_url, without_secrets
from .workers import Failed, isolated_map

__all__ = ["Place", "find"]

UNPACK_CPU_S, UNPACK_WALL_S, UNPACK_BYTES = 3600, 36000.0, 2 << 30  # for one archive; it is written piece by piece


def find(
    folder: str | Path, leave_out: Path | None, scratch: Path, archives: ArchiveLimits | None = None
) -> dict[str, Place]:
    """3D files under a folder by name, sorted: relative with "/", and ARCHIVE/inner/file for what an archive holds.

    Args:
        folder: a path, or the URL of a folder, an archive or a 3D file: whatever fsspec reads (s3://, gs://,
            sftp://, …), and https:// where the server lists what it has.
        leave_out: a folder that is not looked into; neither are hidden ones, nor archives in archives.
        scratch: an empty folder, which archives are unpacked into, in a process that may die of them, and which gets
            what is downloaded.
    Raises: UserError if there is no such folder, it cannot be reached, or there is nothing in it.
    """
    archives = archives or ArchiveLimits()
    where, stamps = _listed(folder, leave_out, scratch)
    places = {name: Place(where, name, stamp) for name, stamp in stamps.items() if name.lower().endswith(SUFFIXES)}
    packed = [Place(where, name, stamps[name]) for name in sorted(stamps) if name.lower().endswith(ARCHIVE_SUFFIXES)]
    jobs = [(place, scratch / str(k), archives) for k, place in enumerate(packed)]
    outcomes = isolated_map(
        _unpack, jobs, workers=1, cpu_s=UNPACK_CPU_S, wall_s=UNPACK_WALL_S, memory_bytes=UNPACK_BYTES
    )
    with Bar(len(packed), "unpacking", quiet=not packed) as bar:
        for (place, root, _), refused in zip(jobs, outcomes):
            if isinstance(refused, Failed):
                refused = Rejected(refused.reason, "unpack it yourself, or leave it out")
            unpacked = LocalFolder(root, origin=tuple(place.stamp))
            inner = {} if refused else walk(unpacked, leave_out)
            inner = {file: stamp for file, stamp in inner.items() if file.lower().endswith(SUFFIXES)}
            if not inner:
                refused = refused or Rejected("it holds no 3D files", "leave it out")
                places[place.name] = Place(where, place.name, place.stamp, refused)
            places |= {f"{place.name}/{file}": Place(unpacked, file, stamp) for file, stamp in inner.items()}
            bar.update(1)
    if not places:
        shown = without_secrets(str(folder)) if is_url(folder) else folder
        raise UserError(f"the folder {shown} has no 3D files: put {', '.join(SUFFIXES)} files into it")
    return dict(sorted(places.items()))


def _listed(folder: str | Path, leave_out: Path | None, scratch: Path) -> tuple[Folder, dict[str, Stamp]]:
    """The folder, and stamps of all its files."""
    if isinstance(folder, str) and folder.startswith("file://"):
        path = Path(unquote(urlsplit(folder).path))
        if path.is_file():
            parent = LocalFolder(path.parent)
            return parent, {path.name: parent.stamp_of(path) or []}
        folder = path
    if isinstance(folder, str) and is_url(folder):
        return found_at(folder, scratch)
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"the folder {folder} does not exist")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder of 3D files: give the folder that it is in")
    local = LocalFolder(folder)
    return local, walk(local, leave_out)


def _unpack(job: tuple[Place, Path, ArchiveLimits]) -> Rejected | None:
    """Runs in a worker."""
    place, into, limits = job
    try:
        with place.local(Limits(file_bytes=limits.total_bytes)) as (path, _):
            unpack(path, into, limits)
    except Rejected as rejected:
        return rejected
    return None
