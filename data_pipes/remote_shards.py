"""Folders of shards that are not on this machine's disk: over HTTP, in an object store, or behind a command.

    https://host/raw                  read with ranges by the standard library, proxies as the environment says
    s3://bucket/raw, gs://…, …        by fsspec, which wants a package for each (s3fs, gcsfs, adlfs, …)
    memory://raw, file:///data/raw    by fsspec alone
    pipe:curl -s https://host/{name}  the output of a shell command; {name} becomes the file's name

A command is run as it stands: it comes from the user's own command line or file of settings, never from the data. A
shard's name, which does come from the data, may only have letters, digits, '.', '_' and '-'.

manifest.json and index.bin are fetched when the folder is opened, into a temporary folder (index.bin takes some 100 to
300 bytes a sample); shards are never kept on the disk.
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
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ASIDE
from .index import INDEX
from .remote_files import without_secrets
from .sample_bytes import ByteSource, Damaged, retried
from .shard_folder import ShardFolder
from .shards import MANIFEST, RAW_FORMAT, index_path

__all__ = ["RemoteShards", "is_remote", "open_shards"]

TIMEOUT_S = 60.0  # a connection that says nothing for so long is broken

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_PIPE = "pipe:"


def is_remote(folder: str | Path) -> bool:
    """Whether this names shards by a URL or a command, not by a path."""
    return isinstance(folder, str) and (folder.startswith(_PIPE) or "://" in folder)


def open_shards(folder: str | Path, format: str = RAW_FORMAT, damaged: Damaged = "fatal") -> ShardFolder:
    """A folder of shards, wherever it is. Raises UserError as `ShardFolder` and `RemoteShards` do."""
    return RemoteShards(str(folder), format, damaged) if is_remote(folder) else ShardFolder(folder, format, damaged)


class RemoteShards(ShardFolder):
    """As `ShardFolder`, with every sample read by one request of the bytes where it lies.

    A pipe has no ranges: to reach a sample, its shard is read from the start.

    Args:
        url: as at the head of this file.
    Raises: UserError where the manifest or the index cannot be had, a package is missing, or a command has no {name}.
        A shard that is missing is noticed when it is read.
    """

    retry_after_s = (0.2, 1.0, 5.0)

    def __init__(self, url: str, format: str = RAW_FORMAT, damaged: Damaged = "fatal") -> None:
        self._open = _opener(url)
        self._shown = url if url.startswith(_PIPE) else without_secrets(url)
        self._fetched = Path(tempfile.mkdtemp(prefix="shapeloom-index-"))
        weakref.finalize(self, shutil.rmtree, self._fetched, ignore_errors=True)
        self._fetch(MANIFEST)
        super().__init__(self._fetched, format, damaged)
        self.folder = self._shown

    def open(self, name: str, offset: int = 0, size: int | None = None) -> ByteSource:
        """As `ShardFolder.open`; with a `size`, all of it is there when this returns, or UserError says why not."""
        if size is None:
            return self._open(_checked(name), offset, None)

        def fetch() -> ByteSource:
            with contextlib.closing(self._open(_checked(name), offset, size)) as file:
                data = file.read(size)
            if len(data) < size:
                raise OSError(f"it ends {size - len(data)} bytes early")
            return io.BytesIO(data)

        try:
            return retried(fetch, self.retry_after_s)
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # every network library has its own
            raise UserError(f"{self._shown}/{name} cannot be read from byte {offset} on ({_words(error)})") from None

    def _fetch(self, name: str) -> None:
        """A small file into the temporary folder. Raises UserError if it cannot be had."""

        def fetch() -> None:
            aside = self._fetched / f"{name}{ASIDE}{threading.get_ident()}"
            with contextlib.closing(self._open(name, 0, None)) as there, open(aside, "wb") as here:
                shutil.copyfileobj(there, here)
            os.replace(aside, self._fetched / name)

        try:
            retried(fetch, self.retry_after_s)
        except FileNotFoundError:
            raise UserError(f"{self._shown} has no {name}: is it a folder of shards, and all of it copied?") from None
        except Exception as error:  # every network library has its own
            raise UserError(f"{name} cannot be read from {self._shown} ({_words(error)})") from None

    def _fault(self, shard: dict[str, Any]) -> str:
        _checked(str(shard["name"]))
        return ""  # that one is missing or short shows when it is read

    def _open_index(self) -> Any:
        if "index" in self.manifest:
            self._fetch(INDEX)
        else:
            for shard in self.manifest["shards"]:
                self._index_file(shard["name"])
        return super()._open_index()

    def _index_file(self, shard: str) -> Path:
        name = index_path(Path(shard)).name
        if not (self._fetched / name).is_file():
            self._fetch(name)
        return self._fetched / name


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"the manifest names a shard {name!r}: only letters, digits, '.', '_' and '-' are allowed")
    return name


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------------------------------------- ways to open a file


def _opener(url: str) -> Callable[[str, int, int | None], ByteSource]:
    """(name, offset, size or None for the rest) -> a file to read from there on."""
    if url.startswith(_PIPE):
        command = url.removeprefix(_PIPE)
        if "{name}" not in command:
            raise UserError(f"'{url}' must have {{name}} where the file's name goes: pipe:curl -s URL/{{name}}")
        return lambda name, offset, size: _Output(command.replace("{name}", shlex.quote(name)), offset)
    if url.startswith(("http://", "https://")):
        return lambda name, offset, size: _get(f"{url.rstrip('/')}/{name}", offset, size)
    return _fsspec_opener(url)


def _fsspec_opener(url: str) -> Callable[[str, int, int | None], ByteSource]:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{scheme}:// is read with a package that is not installed ({_words(error)})") from None
    except ValueError as error:
        raise UserError(f"{url} is not understood ({_words(error)})") from None

    def open_at(name: str, offset: int, size: int | None) -> ByteSource:
        where = f"{path.rstrip('/')}/{name}"
        if scheme == "memory":  # it hands one file, with one place in it, to all who open it
            data = system.open(where, "rb").getvalue()
            return io.BytesIO(data[offset : None if size is None else offset + size])
        if size is not None:
            return io.BytesIO(system.cat_file(where, offset, offset + size))
        file = system.open(where, "rb")
        file.seek(offset)
        return file

    return open_at


def _get(url: str, offset: int, size: int | None) -> ByteSource:
    headers = {"User-Agent": "shapeloom"}
    if offset or size is not None:
        headers["Range"] = f"bytes={offset}-{'' if size is None else offset + size - 1}"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(url) from None
        if error.code == 416:  # the range begins behind the end
            return io.BytesIO()
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    if offset and answer.status != 206:  # a server that knows no ranges sends everything
        _drop(answer, offset)
    return answer


def _drop(file: ByteSource, count: int) -> None:
    while count and (block := file.read(min(count, 1 << 20))):
        count -= len(block)


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
        _drop(self, offset)

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
