"""Folders of shards that are not on this machine's disk: over HTTP, in an object store, or behind a command.

    https://host/raw                  read with ranges by the standard library, proxies as the environment says
    s3://bucket/raw, gs://…, …        by fsspec, which wants a package for each (s3fs, gcsfs, adlfs, …)
    memory://raw, file:///data/raw    by fsspec alone
    pipe:curl -s https://host/{name}  the output of a shell command; {name} becomes the file's name

A command is run as it stands: it comes from the user's own command line or file of settings, never from the data. A
file's name, which does come from the data, may only have letters, digits, '.', '_' and '-', and folders before it.

manifest.json and index.bin are fetched when the folder is opened, into a temporary folder (index.bin takes some 100 to
300 bytes a sample); shards are read where they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ASIDE
from .index import INDEX
from .sample_bytes import ByteSource, Damaged
from .shard_folder import ShardFolder, lacks
from .shards import MANIFEST, RAW_FORMAT, index_name
from .store import LocalStore
from .urls import HttpFolder, as_user_errors, is_http, is_url, open_filesystem, pieces, retried, without_secrets

__all__ = ["RemoteShards", "RemoteSource", "is_remote", "open_shards", "source_at"]

_NAME = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*")
_PIPE = "pipe:"


def is_remote(folder: object) -> bool:
    """Whether this names shards by a URL or a command, not by a path."""
    return is_url(folder) or str(folder).startswith(_PIPE)


def open_shards(folder: str | Path, format: str = RAW_FORMAT, damaged: Damaged = "fatal") -> ShardFolder:
    """A folder of shards, wherever it is. Raises UserError as `ShardFolder` and `RemoteShards` do."""
    return RemoteShards(str(folder), format, damaged) if is_remote(folder) else ShardFolder(folder, format, damaged)


def source_at(folder: str | Path) -> RemoteSource | LocalStore:
    """The files of a folder, wherever it is, finished and whole or not. Raises UserError for a URL of no use."""
    return RemoteSource(str(folder)) if is_remote(folder) else LocalStore(Path(folder))


class RemoteSource:
    """The files of a folder at a URL, as at the head of this module.

    Raises: UserError where a package is missing, or a command has no {name}.
    """

    retry_after_s = (0.2, 1.0, 5.0)

    def __init__(self, url: str) -> None:
        self._open = _opener(url)
        self._shown = url if url.startswith(_PIPE) else without_secrets(url)

    def where(self, name: str = "") -> str:
        """Without what may be secret in it."""
        if self._shown.startswith(_PIPE):
            return self._shown.replace("{name}", name) if name else self._shown
        return f"{self._shown.rstrip('/')}/{name}" if name else self._shown

    def open(self, name: str, offset: int = 0, size: int | None = None) -> ByteSource:
        """A file from a byte on; with a `size`, all of it is there when this returns.

        Raises: FileNotFoundError; UserError for a name that may not be, and where it cannot be read.
        """
        _refuse_odd(name)
        if size is None:
            return self._open(name, offset, None)

        def fetch() -> ByteSource:
            with contextlib.closing(self._open(name, offset, size)) as file:
                data = file.read(size)
            if len(data) < size:
                raise OSError(f"it ends {size - len(data)} bytes early")
            return io.BytesIO(data)

        with self._telling(f"{self.where(name)}, from byte {offset} on,"):
            return retried(fetch, self.retry_after_s)

    @property
    def says_what_is_not_there(self) -> bool:
        return not self._shown.startswith(_PIPE)

    def fetch(self, name: str, path: Path, *, retry: bool = True) -> None:
        """Copy a file to `path`. Raises as `open`."""
        _refuse_odd(name)
        path.parent.mkdir(parents=True, exist_ok=True)

        def fetch() -> None:
            aside = path.with_name(f"{path.name}{ASIDE}{threading.get_ident()}")
            try:
                with contextlib.closing(self.open(name)) as there, open(aside, "wb") as here:
                    for piece in pieces(there):
                        here.write(piece)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)

        with self._telling(self.where(name)):
            retried(fetch, self.retry_after_s if retry else ())

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A file as one on this machine, in TMPDIR for as long. Raises as `open`."""
        with tempfile.TemporaryDirectory(prefix="shapeloom-shard-") as folder:
            path = Path(folder) / name
            self.fetch(name, path)
            yield path

    def _telling(self, what: str) -> contextlib.AbstractContextManager[None]:
        return as_user_errors(what, but=(FileNotFoundError,))


class RemoteShards(ShardFolder):
    """As `ShardFolder`, with every sample read by one request of the bytes where it lies.

    A pipe has no ranges: to reach a sample, its shard is read from the start.

    Args:
        url: as at the head of this file.
    Raises: UserError where the manifest or the index cannot be had, and as RemoteSource. A shard that is missing is
        noticed when it is read.
    """

    def __init__(self, url: str, format: str = RAW_FORMAT, damaged: Damaged = "fatal") -> None:
        self._source = RemoteSource(url)
        self.retry_after_s = self._source.retry_after_s
        self._fetched = Path(tempfile.mkdtemp(prefix="shapeloom-index-"))
        weakref.finalize(self, shutil.rmtree, self._fetched, ignore_errors=True)
        try:
            self._source.fetch(MANIFEST, self._fetched / MANIFEST)
        except FileNotFoundError:
            raise lacks(self._source.where(), MANIFEST) from None
        super().__init__(self._fetched, format, damaged, shown=self._source.where())

    @property
    def title(self) -> str:
        sure = self._source.says_what_is_not_there  # a command may hold secrets
        return (self._source.where().rstrip("/").rpartition("/")[2] if sure else "") or "raw shards"

    def open(self, name: str, offset: int = 0, size: int | None = None) -> ByteSource:
        return self._source.open(name, offset, size)

    def local(self, name: str) -> Path:
        path = super().local(name)
        if not path.is_file():
            sure = self._source.says_what_is_not_there
            try:
                self._source.fetch(name, path, retry=sure)
            except FileNotFoundError:
                pass
            except UserError as error:
                # What may be read but not listed is refused where it is not there, by S3 for one.
                if sure and not isinstance(error.__cause__, PermissionError):
                    raise
        return path

    def _fault(self, shard: dict[str, Any]) -> str:
        _refuse_odd(str(shard["name"]))
        return ""  # that one is missing or short shows when it is read

    def _open_index(self) -> Any:
        self.local(INDEX)  # where it cannot be had, the shards' own indices serve
        return super()._open_index()

    def _index_file(self, shard: str) -> Path:
        name = index_name(Path(shard).name)
        path = self.local(name)
        if not path.is_file():
            raise lacks(self._source.where(), name)
        return path


def _refuse_odd(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"the data names a file {name!r}: only letters, digits, '.', '_', '-' and '/' are allowed")


# ---------------------------------------------------------------------------------------------- ways to open a file


def _opener(url: str) -> Callable[[str, int, int | None], ByteSource]:
    """(name, offset, size or None for the rest) -> a file to read from there on."""
    if url.startswith(_PIPE):
        command = url.removeprefix(_PIPE)
        if "{name}" not in command:
            raise UserError(f"'{url}' must have {{name}} where the file's name goes: pipe:curl -s URL/{{name}}")
        return lambda name, offset, size: _Output(command.replace("{name}", shlex.quote(name)), offset)
    if is_http(url):
        with as_user_errors(without_secrets(url)):
            folder = HttpFolder(url)
        return lambda name, offset, size: folder.get(folder.address(name), offset, size)
    return _fsspec_opener(url)


def _fsspec_opener(url: str) -> Callable[[str, int, int | None], ByteSource]:
    system, path = open_filesystem(url)
    protocol = system.protocol

    def open_at(name: str, offset: int, size: int | None) -> ByteSource:
        where = f"{path.rstrip('/')}/{name}"
        if protocol == "memory":  # it hands one file, with one place in it, to all who open it
            data = system.open(where, "rb").getvalue()
            return io.BytesIO(data[offset : None if size is None else offset + size])
        if size is not None:
            return io.BytesIO(system.cat_file(where, offset, offset + size))
        file = system.open(where, "rb")
        file.seek(offset)
        return file

    return open_at


class _Output:
    """What a shell command writes, from a byte on; a command that fails raises OSError where its output ends."""

    def __init__(self, command: str, offset: int) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # so that all it started can be ended
        )
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        while offset and (block := self.read(min(offset, 1 << 20))):
            offset -= len(block)

    def read(self, size: int = -1) -> bytes:
        data = self._stdout.read(size)
        if (size < 0 or len(data) < size) and self._process.wait():
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the command ended with {self._process.returncode}{': ' if said else ''}{said}")
        return data

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._stdout.close()
        self._process.wait()
        self._said.close()
