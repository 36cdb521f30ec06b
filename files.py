"""Small file helpers that every folder shares: things are written aside and renamed, hashes, JSON with clear errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ASIDE, UserError


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` so that a reader, or a crash, meets the old file or the new one.

    Missing parent folders are made. Raises OSError as the file system does (disk full, no permission); the old file is
    then still whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    handle, aside = tempfile.mkstemp(prefix=path.name + ASIDE, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from the user's group
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new empty folder beside `path` to write into, renamed to `path` when the block ends without an exception.

    A folder already at `path` is replaced; it is moved aside first, so that there is never half of one. After an
    exception the aside folder is removed and `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=path.name + ASIDE, dir=path.parent))
    try:
        os.chmod(aside, 0o777 & ~_umask())
        yield aside
        for folder, _, names in os.walk(aside):
            for name in names:
                _sync_file(Path(folder, name))
        if path.exists() or path.is_symlink():
            old = Path(tempfile.mkdtemp(prefix=path.name + ASIDE + "old-", dir=path.parent))
            os.replace(path, old / path.name)
            try:
                os.replace(aside, path)
            except BaseException:
                os.replace(old / path.name, path)
                old.rmdir()
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(obj: Any) -> str:
    """JSON with sorted keys and no spaces: equal objects give equal text. Raises ValueError for NaN or infinity."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_json(obj: Any) -> str:
    """The sha256 of the canonical JSON of `obj`, in hex."""
    return hashlib.sha256(canonical_json(obj).encode("utf-8")).hexdigest()


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically."""
    write_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str = "file", *, limit_bytes: int = 256 << 20, shown: object = None) -> Any:
    """Read a JSON file.

    Args:
        what: what the file is to the user, for the message ("the manifest of the shards").
        limit_bytes: a larger file is refused, so that a hostile one cannot fill the memory.
        shown: the file's name for the message, where that is not its path.
    Raises: UserError naming the file and the problem.
    """
    path, shown = Path(path), shown or path
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise UserError(f"{what} {shown} is {size} bytes long, more than the {limit_bytes} allowed")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {shown} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {shown} is not UTF-8 text, so it is not JSON") from None
    except OSError as error:
        raise UserError(f"{what} {shown} cannot be read ({error.strerror or error})") from None
    return parse_json(text, f"{what} {shown}")


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON from outside. Raises UserError that begins with `what`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not valid JSON (line {error.lineno}: {error.msg})") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} is not UTF-8 text, so it is not JSON") from None
    except RecursionError:
        raise UserError(f"{what} is not valid JSON (nested too deeply)") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    """Make a rename last through a power cut, where the file system offers it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
