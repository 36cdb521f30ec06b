"""Folders of 3D files that are not on this machine: any file system of fsspec (s3://, gs://, sftp://, memory:// …),
and what a web server lists under https://."""

from __future__ import annotations

import contextlib
import errno
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import fsspec

from ..errors import UserError
from .limits import Limits, Rejected
from .places import UNKNOWN, Stamp, is_hidden
from .urls import (
    HttpFolder,
    as_user_errors,
    is_full_disk,
    is_http,
    length_of,
    open_filesystem,
    pieces,
    retried,
    told,
    without_secrets,
)

__all__ = ["RemoteFolder", "found_at"]

RETRY_AFTER_S = (1.0, 4.0)
_LISTING_BYTES = 64 << 20  # of one page
_MOST_FOLDERS = 100_000
# Whatever a store calls what changes with a file's content, the surest first.
_TAGS = ("ETag", "etag", "md5Hash", "checksum", "CRC", "sha", "LastModified", "last_modified", "updated")
_TIMES = ("mtime", "modified", "modify", "created")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL; what a query string says (a token, mostly) goes with every file.

    scratch: a folder for downloads that is removed when a run is over, whatever became of its processes. Where there
        is none, on another machine for example, it is TMPDIR.
    """

    url: str
    scratch: str = ""

    def stamp(self, name: str) -> Stamp | None:
        """From one listing of the file's folder, kept for as long as the process lives or until the next `found_at`."""
        name = posixpath.normpath(name)
        if not _is_inside(name):
            return None
        try:
            return _listed(self.url, posixpath.dirname(name)).get(name)
        except UserError:
            return None

    @contextlib.contextmanager
    def local(self, name: str, limits: Limits) -> Iterator[tuple[Path, Path]]:
        scratch = self.scratch if Path(self.scratch or "/nowhere").is_dir() else None
        with tempfile.TemporaryDirectory(prefix="shapeloom-download-", dir=scratch) as folder:
            path = Path(folder) / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(name, path, limits)
            except OSError as error:
                if is_full_disk(error):
                    hint = "set TMPDIR to a folder on a larger disk"
                    raise Rejected("there is no room to download it", hint, kind="unavailable") from None
                raise Rejected(f"it cannot be downloaded ({error.strerror or error})") from None
            yield path, Path(folder)

    @property
    def fetches(self) -> bool:
        return True

    def fetch(self, name: str, most: int) -> bytes | None:
        def read() -> bytes | None:
            try:
                with _transport(self.url).open(name) as source:
                    return b"".join(pieces(source, most + 1))
            except (FileNotFoundError, IsADirectoryError):
                return None

        with _rejecting(f"its file {name[:80]!r}"):
            return retried(read, RETRY_AFTER_S)

    def _download(self, name: str, path: Path, limits: Limits) -> None:
        def write() -> None:
            n_bytes = 0
            with open(path, "wb") as file, _transport(self.url).open(name) as source:
                limits.check("bytes", length_of(source) or 0, limits.file_bytes)
                for piece in pieces(source, limits.file_bytes + 1):
                    n_bytes += len(piece)
                    limits.check("bytes", n_bytes, limits.file_bytes)
                    file.write(piece)

        with _rejecting("it"):
            retried(write, RETRY_AFTER_S)


def found_at(url: str, scratch: Path) -> tuple[RemoteFolder, dict[str, Stamp]]:
    """The folder at a URL, and stamps of all its files by name, hidden ones left out; of one file where it is one.

    Raises: UserError, if there is nothing, it may not be read, cannot be reached, or what reads it is not installed.
    """
    _transport.cache_clear()
    _listed.cache_clear()
    url = re.sub(r"^(zip|tar)://::", "", url)  # the archive itself, which is unpacked here as any other
    with as_user_errors(without_secrets(url), urlsplit(url).scheme):
        if (stamp := _transport(url).itself()) is not None:
            parent, name = _split(url)
            return RemoteFolder(parent, str(scratch)), {name: stamp}
        stamps = _transport(url).files()
    return RemoteFolder(url, str(scratch)), {
        name: stamps[name] for name in sorted(stamps) if _is_inside(name) and not is_hidden(name)
    }


# ------------------------------------------------------------------------------------------------------ transports


class _Transport(Protocol):
    def itself(self) -> Stamp | None:
        """The stamp of the URL itself where it is a file."""
        ...

    def files(self) -> dict[str, Stamp]:
        """All files below, by name."""
        ...

    def listing(self, folder: str) -> dict[str, Stamp]:
        """The files right in a folder ("": the root), by their names from the root."""
        ...

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Raises FileNotFoundError if there is none."""
        ...


class _Fsspec:
    def __init__(self, url: str) -> None:
        self.fs, self.root = open_filesystem(url)
        self.fs.invalidate_cache()

    def itself(self) -> Stamp | None:
        entry = self.fs.info(self.root)
        return _stamp(entry) if entry["type"] == "file" else None

    def files(self) -> dict[str, Stamp]:
        # What cannot be listed is not taken for empty: its files would be taken for gone.
        loud = {"on_error": "raise"} if type(self.fs).find is fsspec.AbstractFileSystem.find else {}
        return self._stamps(self.fs.find(self.root, detail=True, **loud).values())

    def listing(self, folder: str) -> dict[str, Stamp]:
        return self._stamps(entry for entry in self.fs.ls(self._path(folder), detail=True) if entry["type"] == "file")

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return self.fs.open(self._path(name), "rb")

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}".rstrip("/")

    def _stamps(self, entries: Iterable[dict[str, Any]]) -> dict[str, Stamp]:
        root = self._path("").strip("/")
        return {entry["name"].strip("/").removeprefix(root).lstrip("/"): _stamp(entry) for entry in entries}


def _stamp(entry: dict[str, Any]) -> Stamp:
    tag = next((str(entry[key]) for key in (*_TAGS, *_TIMES) if entry.get(key) is not None), None)
    return [entry.get("size"), tag]


class _Http:
    """What a web server lists: the links of a page that lead below it."""

    def __init__(self, url: str) -> None:
        self._folder = HttpFolder(url)

    def itself(self) -> Stamp | None:
        if self._folder.itself.partition("?")[0].endswith("/"):
            return None
        with self._folder.get(self._folder.itself) as answer:
            if answer.headers.get_content_type() == "text/html":  # a listing
                return None
            return [length_of(answer), answer.headers.get("ETag") or answer.headers.get("Last-Modified")]

    def files(self) -> dict[str, Stamp]:
        found: dict[str, Stamp] = {}
        folders, seen = [""], {""}
        while folders:
            folder = folders.pop()
            try:
                files, inner = self._links(folder)
            except FileNotFoundError:
                if not folder:
                    raise
                continue  # a dead link
            found |= dict.fromkeys(files, UNKNOWN)
            folders += sorted(inner - seen, reverse=True)
            seen |= inner
            if len(seen) > _MOST_FOLDERS:
                raise UserError(f"{self._folder.base} lists more than {_MOST_FOLDERS:,} folders: give one with fewer")
        return {name: list(stamp) for name, stamp in found.items()}

    def listing(self, folder: str) -> dict[str, Stamp]:
        return {name: list(UNKNOWN) for name in self._links(folder)[0]}

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return self._folder.get(self._folder.address(name))

    def _links(self, folder: str) -> tuple[set[str], set[str]]:
        """Names of files and of folders in a folder."""
        address = self._folder.address(f"{folder}/" if folder else "")
        page = address.partition("?")[0]
        with self._folder.get(address) as answer:
            data = b"".join(pieces(answer, _LISTING_BYTES + 1))
        if len(data) > _LISTING_BYTES:
            raise UserError(f"{page} is a list of more than {_LISTING_BYTES >> 20} MB: give folders with fewer files")
        links = _Links()
        links.feed(data.decode("utf-8", "replace"))
        files: set[str] = set()
        folders: set[str] = set()
        for href in links.found:
            with contextlib.suppress(ValueError):
                place = urlunsplit(urlsplit(urljoin(page, href))._replace(query="", fragment=""))
                if unquote(place).startswith(unquote(page)):  # servers differ in what they quote
                    name = unquote(place).removeprefix(unquote(self._folder.base))
                    if _is_inside(name.rstrip("/")):
                        (folders if name.endswith("/") else files).add(name.rstrip("/"))
        return files, folders - {folder}


class _Links(HTMLParser):
    """The href of every <a>."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


@lru_cache(maxsize=8)
def _transport(url: str) -> _Transport:
    return _Http(url) if is_http(url) else _Fsspec(url)


@lru_cache(maxsize=64)
def _listed(url: str, folder: str) -> dict[str, Stamp]:
    with as_user_errors(without_secrets(url), urlsplit(url).scheme):
        try:
            return _transport(url).listing(folder)
        except FileNotFoundError:
            return {}


# ---------------------------------------------------------------------------------------------------- when it fails


@contextlib.contextmanager
def _rejecting(what: str) -> Iterator[None]:
    """What a network library raises becomes Rejected, which tells what cannot be had; a full disk is told by others."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if is_full_disk(error) or (isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG):
            raise
        reason, hint = told(error)
        raise Rejected(f"{what} {reason}", hint, kind="unavailable") from error


# ----------------------------------------------------------------------------------------------------------- names


def _split(url: str) -> tuple[str, str]:
    """The URL of a file's folder, and its name."""
    first, mark, chain = url.partition("::")
    path, question, query = first.partition("?") if is_http(url) else (first, "", "")
    folder, _, name = path.rpartition("/")
    return f"{folder}/{question}{query}{mark}{chain}", unquote(name) if is_http(url) else name


def _is_inside(name: str) -> bool:
    return bool(name) and not re.search(r"[\0\\]", name) and not {"", ".", ".."} & set(name.split("/"))
