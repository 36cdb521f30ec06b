"""Where a 3D file is, on this machine or not: what a build needs to notice that it changed, and to read it."""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from ..errors import UserError
from .limits import Fetch, Limits, Rejected

__all__ = ["UNKNOWN", "Folder", "LocalFolder", "Place", "Stamp", "is_hidden", "is_known", "walk"]

Stamp = list[int | str | None]
UNKNOWN: Stamp = [None, None]  # size and change of a file that only reading it would tell of


def is_known(stamp: Stamp) -> bool:
    """Whether it would be another after a change that keeps the size."""
    return stamp[1] is not None


class Folder(Protocol):
    """A folder whose files are named relative to it with "/"; small and picklable."""

    def stamp(self, name: str) -> Stamp | None:
        """Size and what changes with the content, without reading the file; None if there is none inside."""
        ...

    def local(self, name: str, limits: Limits) -> AbstractContextManager[tuple[Path, Path]]:
        """The file on this machine's disk, and the folder there in which the files that it names must lie."""
        ...

    @property
    def fetches(self) -> bool:
        """Whether files that another names must be asked for by `fetch`."""
        ...

    def fetch(self, name: str, most: int) -> bytes | None:
        """As limits.Fetch. Raises: Rejected."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """origin: the stamp of the archive that it was unpacked from, whose files are only as old as the unpacking."""

    path: Path
    origin: tuple[int | str | None, ...] | None = None

    def stamp(self, name: str) -> Stamp | None:
        with contextlib.suppress(OSError, ValueError):
            inside = (self.path / name).resolve()
            if inside.is_relative_to(self.path.resolve()):
                return self.stamp_of(inside)
        return None

    def stamp_of(self, path: Path) -> Stamp | None:
        """[size in bytes, time of the last change in ns], or [size, *origin]. Raises OSError if there is nothing."""
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return None
        return [found.st_size, found.st_mtime_ns] if self.origin is None else [found.st_size, *self.origin]

    def local(self, name: str, limits: Limits) -> AbstractContextManager[tuple[Path, Path]]:
        return contextlib.nullcontext((self.path / name, self.path))

    @property
    def fetches(self) -> bool:
        return False

    def fetch(self, name: str, most: int) -> bytes | None:
        return None


@dataclass(frozen=True, slots=True)
class Place:
    """A 3D file: `name` relative to a folder, local or remote. Small, so that it may go to other processes.

    stamp: a short list for JSON that changes when the file does, known without reading it: its size and its time of
        change, or the checksum that a store keeps. [None, None] where the listing says neither (HTTP).
    refused: for an archive that stands for itself, because nothing could be taken from it.

    To read it::

        with place.local(limits) as (path, root):
            mesh = read_mesh(path, limits, root=root, fetch=place.fetch)
    """

    folder: Folder
    name: str
    stamp: Stamp = field(default_factory=lambda: list(UNKNOWN))
    refused: Rejected | None = None

    def local(self, limits: Limits | None = None) -> AbstractContextManager[tuple[Path, Path]]:
        """The path of the file on this machine and the root for the files it names; downloads end with the block.

        Raises: Rejected for a file that cannot be had, or is larger than the limits allow.
        """
        return self.folder.local(self.name, limits or Limits())

    @property
    def fetch(self) -> Fetch | None:
        """How `read_mesh` gets the files that this one names; None where they are on the disk."""
        return partial(_fetch, self.folder) if self.folder.fetches else None

    def sidecar_stamp(self, name: str) -> Stamp | None:
        """As `stamp`, of a file by the name that this one has for it; None if there is none inside the folder."""
        here = posixpath.dirname(self.name)
        tried = (name, unquote(name).replace("\\", "/"))  # as Sidecars
        stamps = (self.folder.stamp(posixpath.join(here, one)) for one in tried)
        return next((stamp for stamp in stamps if stamp is not None), None)

    @property
    def path(self) -> Path:
        """Of a local file."""
        return self.root / self.name

    @property
    def root(self) -> Path:
        """The folder of a local file in which the files that it names must lie."""
        if not isinstance(self.folder, LocalFolder):
            raise TypeError(f"{self.name} is not on this machine: use local()")
        return self.folder.path


def _fetch(folder: Folder, name: str, most: int) -> bytes | None:
    return folder.fetch(name, most)


def walk(folder: LocalFolder, leave_out: Path | None = None) -> dict[str, Stamp]:
    """Stamps of all files below a folder by name; hidden ones and what `leave_out` holds are passed over."""
    leave_out = None if leave_out is None else leave_out.resolve()
    found: dict[str, Stamp] = {}

    def stop(error: OSError) -> None:
        # What cannot be looked into is not taken for empty: its files would be taken for gone.
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): make it readable, or leave it out")

    for place, folders, names in os.walk(folder.path, onerror=stop):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() != leave_out
        ]
        for path in (Path(place) / name for name in names if not name.startswith(".")):
            stamp = None
            with contextlib.suppress(OSError):  # a link to nowhere is found out, and told of, where it is read
                stamp = folder.stamp_of(path)
            found[path.relative_to(folder.path).as_posix()] = stamp or list(UNKNOWN)
    return found


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
