"""Finds the 3D files of a folder, here or at a URL, and of the archives in it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from ..errors import UserError
from ..progress import Bar
from .archives import ARCHIVE_SUFFIXES, ArchiveLimits, ZipFolder, unpack
from .limits import Limits, Rejected
from .places import Folder, LocalFolder, Place, Stamp, is_hidden, walk
from .read import SUFFIXES
from .remote_files import found_at
from .urls import is_url, without_secrets
from .workers import Failed, isolated_map

__all__ = ["Place", "find"]

# What 3D programs write, and nothing here reads.
UNREAD = (
    *(".3ds", ".abc", ".blend", ".c4d", ".drc", ".fbx", ".iges", ".igs", ".lwo", ".ma", ".max", ".mb", ".skp"),
    *(".step", ".stp", ".vox", ".wrl", ".x3d"),
)
UNPACK_CPU_S, UNPACK_WALL_S, UNPACK_BYTES = 3600, 36000.0, 2 << 30  # for one archive; it is written piece by piece


def find(
    folder: str | Path,
    leave_out: str | Path | None,
    scratch: Path,
    archives: ArchiveLimits | None = None,
) -> dict[str, Place]:
    """3D files under a folder by name, sorted: relative with "/", and ARCHIVE/inner/file for what an archive holds.

    Args:
        folder: a path, or the URL of a folder, an archive or a 3D file: whatever fsspec reads (s3://, gs://,
            sftp://, …), and https:// where the server lists what it has.
        leave_out: a folder, or its URL, that is not looked into; neither are hidden ones, nor archives in archives.
        scratch: an empty folder, which archives are unpacked into, in a process that may die of them, and which gets
            what is downloaded. A .zip on this disk is not unpacked: its members are read from there.
    Raises: UserError if there is no such folder, it cannot be reached, or there is nothing in it.
    """
    archives = archives or ArchiveLimits()
    where, stamps = _listed(folder, leave_out, scratch)
    nameless = [name for name in stamps if not _is_text(name)]
    places = {name: Place(where, name, stamp) for name, stamp in stamps.items() if name.lower().endswith(SUFFIXES)}
    for name in (name for name in stamps if name.lower().endswith(UNREAD)):
        refusal = Rejected(f"{PurePosixPath(name).suffix.lower()} files are not read", "export it as GLB")
        places[name] = Place(where, name, stamps[name], refusal)
    packed = [
        Place(where, name, stamps[name])
        for name in sorted(stamps)
        if name.lower().endswith(ARCHIVE_SUFFIXES) and name not in nameless
    ]
    jobs = [(place, _inside(place, scratch / str(k)), archives) for k, place in enumerate(packed)]
    outcomes = isolated_map(
        _stamps, jobs, workers=1, cpu_s=UNPACK_CPU_S, wall_s=UNPACK_WALL_S, memory_bytes=UNPACK_BYTES
    )
    with Bar(len(packed), "unpacking", quiet=not packed) as bar:
        for (place, inside, _), outcome in zip(jobs, outcomes):
            if isinstance(outcome, Failed):
                outcome = Rejected(outcome.reason, "unpack it yourself, or leave it out")
            if isinstance(outcome, dict):
                places |= {f"{place.name}/{file}": Place(inside, file, stamp) for file, stamp in outcome.items()}
            else:
                places[place.name] = Place(where, place.name, place.stamp, outcome)
            bar.update(1)
    for name in nameless:
        places.pop(name, None)
        readable = name.encode(errors="backslashreplace").decode()
        places[readable] = Place(where, readable, refused=Rejected("its name is not UTF-8 text", "rename it"))
    if not places:
        shown = without_secrets(str(folder)) if is_url(folder) else folder
        raise UserError(f"the folder {shown} has no 3D files: put {', '.join(SUFFIXES)} files into it")
    return dict(sorted(places.items()))


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _listed(folder: str | Path, leave_out: str | Path | None, scratch: Path) -> tuple[Folder, dict[str, Stamp]]:
    """The folder, and stamps of all its files."""
    if isinstance(folder, str) and folder.startswith("file://"):
        path = Path(unquote(urlsplit(folder).path))
        if path.is_file():
            parent = LocalFolder(path.parent)
            return parent, {path.name: parent.stamp_of(path) or []}
        folder = path
    if isinstance(folder, str) and is_url(folder):
        where, stamps = found_at(folder, scratch)
        inner = f"{leave_out or ''}/".removeprefix(f"{folder.rstrip('/')}/")
        return where, {name: stamp for name, stamp in stamps.items() if not name.startswith(inner)}
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"the folder {folder} does not exist")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder of 3D files: give the folder that it is in")
    local = LocalFolder(folder)
    if isinstance(leave_out, str):
        leave_out = Path(unquote(urlsplit(leave_out).path)) if leave_out.startswith("file://") else None
    return local, walk(local, leave_out)


def _inside(archive: Place, scratch: Path) -> LocalFolder | ZipFolder:
    """What an archive will be read from: itself, or a new folder."""
    origin = tuple(archive.stamp)
    if isinstance(archive.folder, LocalFolder) and archive.name.lower().endswith(".zip"):
        return ZipFolder(archive.path, origin)
    return LocalFolder(scratch, origin)


def _stamps(job: tuple[Place, LocalFolder | ZipFolder, ArchiveLimits]) -> dict[str, Stamp] | Rejected:
    """Of the 3D files of an archive, which is unpacked where it must be. Runs in a worker."""
    archive, inside, limits = job
    try:
        if isinstance(inside, ZipFolder):
            found = {name: stamp for name, stamp in inside.stamps(limits).items() if not is_hidden(name)}
        else:
            with archive.local(Limits(file_bytes=limits.total_bytes)) as (path, _):
                unpack(path, inside.path, limits)
            found = walk(inside)
    except Rejected as rejected:
        return rejected
    found = {name: stamp for name, stamp in found.items() if name.lower().endswith(SUFFIXES) and _is_text(name)}
    return found or Rejected("there is no file in it that can be read", "leave it out")
