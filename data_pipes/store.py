"""Where shards are written to: a local folder, or any that fsspec knows by a URL (s3://, gs://, memory://, ...).

Either way a file is under its final name whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import UserError
from ..files import ASIDE, write_atomic
from .urls import as_user_errors, is_http, is_url, open_filesystem, retried, without_secrets

__all__ = ["LocalStore", "RemoteStore", "Store", "side_by_side", "store_at"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Here an upload shows once it is whole, so that it needs no name beside the final one.
_WHOLE_UPLOADS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "oss", "memory"}


class Store(Protocol):
    """A folder of files, each with a name relative to it ("parts/shard-00000.json")."""

    def where(self, name: str = "") -> str:
        """The folder, or a file in it, as users know it."""

    @property
    def at_once(self) -> int:
        """How many small files are best read side by side."""

    def is_new(self) -> bool:
        """Whether there is nothing in it, but for what a killed run wrote aside."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of the files that lie directly in a folder, by name; none if it does not exist."""

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def write(self, name: str, data: bytes | str) -> None:
        """A small file."""

    def compose(self, name: str) -> Path:
        """A new local path to write a large file to, for `publish`."""

    def publish(self, composed: Path, name: str) -> None:
        """Give a composed file its name in here."""

    def local(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A file as a local one, to be read. Raises FileNotFoundError."""

    def delete(self, name: str) -> None:
        """Without complaint where it is not there."""


def side_by_side(store: Store, read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """read(item) of each in their order, a few ahead of their turn where the store is far away."""
    if store.at_once == 1:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(store.at_once, thread_name_prefix="store") as threads:
        coming: deque[Future[Result]] = deque()
        try:
            for item in items:
                coming.append(threads.submit(read, item))
                if len(coming) > 2 * store.at_once:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def store_at(out: str | Path | Store) -> Store:
    """The store that a path or a URL names. Raises UserError for a URL that cannot be used, or a path to a file."""
    if not isinstance(out, (str, Path)):
        return out
    if isinstance(out, str) and (out.startswith("pipe:") or is_http(out)):
        raise UserError(
            f"shards cannot be written to {without_secrets(out)}: give a folder, or a URL as s3://bucket/raw"
        )
    if is_url(out):
        store = RemoteStore(str(out))
        _ = store.filesystem  # a wrong one is told now
        return store
    return LocalStore(Path(out))


@dataclass(frozen=True)
class LocalStore:
    """A folder on this machine's disks."""

    folder: Path

    @property
    def at_once(self) -> int:
        return 1

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def is_new(self) -> bool:
        return not self.folder.exists() or all(ASIDE in entry.name for entry in self.folder.iterdir())

    def sizes(self, folder: str = "") -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return {}

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes | str) -> None:
        write_atomic(self.folder / name, data)

    def compose(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}{ASIDE}{os.getpid()}"

    def publish(self, composed: Path, name: str) -> None:
        os.replace(composed, self.folder / name)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        if not (self.folder / name).is_file():
            raise FileNotFoundError(self.folder / name)
        yield self.folder / name

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class RemoteStore:
    """A folder at a URL. Large files are put together in TMPDIR, one at a time."""

    url: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return open_filesystem(self.url)

    retry_after_s = (0.2, 1.0, 5.0)

    @property
    def at_once(self) -> int:
        # Others (sftp, ftp) have one connection, and threads would take each other's answers.
        return 16 if getattr(self.filesystem, "async_impl", False) else 1

    @property
    def filesystem(self) -> Any:
        return self._opened[0]

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # a connection does not travel

    def where(self, name: str = "") -> str:
        """Without what may be secret in it."""
        url = without_secrets(self.url)
        return f"{url.rstrip('/')}/{name}" if name else url

    def is_new(self) -> bool:
        return all(ASIDE in entry["name"] for entry in self._listed(""))

    def sizes(self, folder: str = "") -> dict[str, int]:
        listed = self._listed(folder)
        files = [entry for entry in listed if entry["type"] == "file"]
        return {posixpath.basename(entry["name"]): entry["size"] for entry in files}

    def read(self, name: str) -> bytes:
        with self._telling(name):
            return retried(lambda: self.filesystem.cat_file(self._path(name)), self.retry_after_s)

    def write(self, name: str, data: bytes | str) -> None:
        with self._telling(name), self._whole(name) as path:
            self.filesystem.pipe_file(path, data.encode() if isinstance(data, str) else data)

    def compose(self, name: str) -> Path:
        handle, path = tempfile.mkstemp(prefix=f"{posixpath.basename(name)}{ASIDE}")
        os.close(handle)
        return Path(path)

    def publish(self, composed: Path, name: str) -> None:
        with self._telling(name), self._whole(name) as path:
            self.filesystem.put_file(str(composed), path)
        composed.unlink()

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        copy = self.compose(name)
        try:
            with self._telling(name):
                self.filesystem.get_file(self._path(name), str(copy))
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._telling(name):
            self.filesystem.rm_file(self._path(name))

    def _telling(self, name: str) -> contextlib.AbstractContextManager[None]:
        """What goes wrong becomes a UserError, but for a file that is not there."""
        return as_user_errors(self.where(name), but=(FileNotFoundError,))

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        self.filesystem.invalidate_cache()
        with contextlib.suppress(FileNotFoundError), self._telling(folder):
            return self.filesystem.ls(self._path(folder), detail=True)
        return []

    def _path(self, name: str) -> str:
        return posixpath.join(self._opened[1].rstrip("/"), name).rstrip("/")

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[str]:
        """Where to upload to; it has its final name afterwards."""
        final = self._path(name)
        self.filesystem.makedirs(posixpath.dirname(final), exist_ok=True)
        protocol = self.filesystem.protocol
        if _WHOLE_UPLOADS.intersection((protocol,) if isinstance(protocol, str) else protocol):
            yield final
            return
        aside = f"{final}{ASIDE}{os.getpid()}"
        try:
            yield aside
            self.filesystem.mv(aside, final)
        except BaseException:
            with contextlib.suppress(Exception):
                self.filesystem.rm_file(aside)
            raise
