"""Unpacks .zip, .tar and .tar.gz files from outside, which may be broken, hostile or larger than they look.

The members of a .zip can be read one by one, so that it may stay as it is (`ZipFolder`).
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from .limits import Limits, Rejected
from .places import Stamp

__all__ = ["ARCHIVE_SUFFIXES", "ArchiveLimits", "ZipFolder", "unpack"]

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_PIECE = 1 << 20
_FREE_BYTES = 16 << 20  # whatever the ratio: a small archive of zeros does no harm
_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class ArchiveLimits:
    """The most that one archive may hold.

    Args:
        members: files and folders.
        total_bytes: unpacked.
        ratio: of unpacked to packed bytes; what is packed more tightly (above 16 MB) is taken for a bomb.
    """

    members: int = 200_000
    total_bytes: int = 64 << 30
    ratio: int = 200


def unpack(path: str | Path, into: str | Path, limits: ArchiveLimits | None = None) -> None:
    """Write an archive's regular files into a folder; links and devices are passed over.

    What the headers say of sizes is not believed: bytes are counted as they come.

    Args:
        into: a new folder. After an error it holds part of the files.
    Raises: Rejected if the archive is broken, encrypted, over the limits, or names files outside itself.
    """
    path, into, limits = Path(path), Path(into), limits or ArchiveLimits()
    with _rejecting():
        bytes_left = min(limits.total_bytes, _FREE_BYTES + limits.ratio * path.stat().st_size)
        into.mkdir(parents=True)
        for name, source in (_zip if path.suffix.lower() == ".zip" else _tar)(path, limits):
            target = into / _inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "xb") as file:
                while piece := source.read(_PIECE):
                    bytes_left -= len(piece)
                    if bytes_left < 0:
                        raise Rejected("it unpacks to far more than it should", "unpack it yourself if you trust it")
                    file.write(piece)


@contextlib.contextmanager
def _rejecting() -> Iterator[None]:
    """Whatever an archive makes its library raise, as Rejected."""
    try:
        yield
    except (Rejected, MemoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Rejected(
                "there is no room to unpack it", "set TMPDIR to a folder on a larger disk", kind="unavailable"
            ) from None
        raise Rejected(f"it cannot be unpacked ({error.strerror or _line(error)})", _AGAIN) from None
    except Exception as error:  # each compression has its own exceptions, and none promises to raise no others
        raise Rejected(f"it cannot be unpacked ({_line(error)})", _AGAIN) from None


@dataclass(frozen=True)
class ZipFolder:
    """The regular files of a .zip on this disk, read without unpacking it (places.Folder).

    origin: the archive's own stamp.
    """

    path: Path
    origin: tuple[int | str | None, ...]

    def stamps(self, limits: ArchiveLimits) -> dict[str, Stamp]:
        """Stamps of all members by name. Raises: Rejected as `unpack`, as far as the headers tell."""
        with _rejecting():
            _, members = _opened(self)
            _check_members(len(members), limits)
            most = min(limits.total_bytes, _FREE_BYTES + limits.ratio * self.path.stat().st_size)
            if sum(info.file_size for info in members.values()) > most:
                raise Rejected("it unpacks to far more than it should", "unpack it yourself if you trust it")
        return {name: self._stamp(info) for name, info in members.items()}

    def stamp(self, name: str) -> Stamp | None:
        with contextlib.suppress(Rejected), _rejecting():
            info = _opened(self)[1].get(posixpath.normpath(name))
            return None if info is None else self._stamp(info)
        return None

    def _stamp(self, info: zipfile.ZipInfo) -> Stamp:
        return [info.file_size, f"{info.CRC:08x}", *self.origin]

    @contextlib.contextmanager
    def local(self, name: str, limits: Limits) -> Iterator[tuple[Path, Path]]:
        data = self.fetch(name, limits.file_bytes)
        if data is None:
            raise Rejected("it is no longer in its archive", "start again")
        limits.check("bytes", len(data), limits.file_bytes)
        with tempfile.TemporaryDirectory(prefix="shapeloom-member-") as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            yield path, Path(folder)

    @property
    def fetches(self) -> bool:
        return True

    def fetch(self, name: str, most: int) -> bytes | None:
        with _rejecting():
            archive, members = _opened(self)
            info = members.get(name)
            if info is None:
                return None
            with archive.open(info) as file:
                return file.read(most + 1)


@lru_cache(maxsize=4)  # kept open: the list of its members is read at each opening
def _opened(folder: ZipFolder) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """An archive, and its regular files by name: no two of one, as one would be unpacked over the other."""
    archive = zipfile.ZipFile(folder.path)
    found: dict[str, zipfile.ZipInfo] = {}
    for info in _files(archive):
        if (name := str(_inside(info.filename))) in found:
            raise Rejected(f"it holds two files of one name ({name[:80]!r})", "unpack it yourself")
        found[name] = info
    return archive, found


def _files(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    for info in archive.infolist():
        if info.flag_bits & 1:
            raise Rejected("it is encrypted", "unpack it yourself")
        is_link = info.external_attr >> 28 == 0o12  # the file type of Unix, where that made it
        if not info.is_dir() and not is_link:
            yield info


def _zip(path: Path, limits: ArchiveLimits) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        _check_members(len(archive.infolist()), limits)
        for info in _files(archive):
            yield info.filename, archive.open(info)


def _tar(path: Path, limits: ArchiveLimits) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(path) as archive:
        for count, member in enumerate(archive, 1):
            _check_members(count, limits)
            if member.isreg() and (source := archive.extractfile(member)) is not None:
                yield member.name, source


def _check_members(count: int, limits: ArchiveLimits) -> None:
    if count > limits.members:
        raise Rejected(f"it holds more than the {limits.members:,} files allowed", "unpack it yourself")


def _inside(name: str) -> PurePosixPath:
    inner = PurePosixPath(name.replace("\\", "/"))
    if inner.is_absolute() or ".." in inner.parts or not inner.parts:
        raise Rejected(f"it names a file outside itself ({name[:80]!r})", "do not trust it")
    return inner


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
