"""Unpacks .zip, .tar and .tar.gz files from outside, which may be broken, hostile or larger than they look."""

from __future__ import annotations

import errno
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from .limits import Rejected

__all__ = ["ARCHIVE_SUFFIXES", "ArchiveLimits", "unpack"]

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
    try:
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
    except (Rejected, MemoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Rejected("there is no room to unpack it", "set TMPDIR to a folder on a larger disk") from None
        raise Rejected(f"it cannot be unpacked ({error.strerror or _line(error)})", _AGAIN) from None
    except Exception as error:  # each compression has its own exceptions, and none promises to raise no others
        raise Rejected(f"it cannot be unpacked ({_line(error)})", _AGAIN) from None


def _zip(path: Path, limits: ArchiveLimits) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        _check_members(len(archive.infolist()), limits)
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise Rejected("it is encrypted", "unpack it yourself")
            is_link = info.external_attr >> 28 == 0o12  # the file type of Unix, where that made it
            if not info.is_dir() and not is_link:
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
