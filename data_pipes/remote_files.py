"""Folders of 3D files that are not on this machine: any file system of fsspec (s3://, gs://, sftp://, memory:// …),
and what a web server lists under https://.

HTTP goes through the standard library: fsspec's needs one more package and reads a listing of any length. What fsspec
finds by itself (keys in the environment or in its own configuration) is how credentials get in; there are no options.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import posixpath
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import fsspec

from ..errors import UserError
from .limits import Limits, Rejected
from .places import UNKNOWN, Stamp, is_hidden

__all__ = ["RemoteFolder", "found_at", "is_url", "told", "without_secrets"]

Result = TypeVar("Result")

RETRY_AFTER_S = (1.0, 4.0)
_TIMEOUT_S = 60
_PIECE = 1 << 20
_LISTING_BYTES = 64 << 20  # of one page
_MOST_FOLDERS = 100_000
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("http", "https"), "aiohttp"),  # within a chain of fsspec's alone
    "hdfs": "pyarrow",
    "oss": "ossfs",
    "smb": "smbprotocol",
}
# Whatever a store calls what changes with a file's content, the surest first.
_TAGS = ("ETag", "etag", "md5Hash", "checksum", "CRC", "sha", "LastModified", "last_modified", "updated")
_TIMES = ("mtime", "modified", "modify", "created")


def is_url(folder: str | Path) -> bool:
    """Whether it is a URL, or a chain of them as fsspec has it (zip://::https://…)."""
    return isinstance(folder, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", folder) is not None


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
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
                    return b"".join(_pieces(source, most + 1))
            except (FileNotFoundError, IsADirectoryError):
                return None

        return _retried(read, f"its file {name[:80]!r}")

    def _download(self, name: str, path: Path, limits: Limits) -> None:
        def write() -> None:
            n_bytes = 0
            with open(path, "wb") as file, _transport(self.url).open(name) as source:
                limits.check("bytes", _length(source) or 0, limits.file_bytes)
                for piece in _pieces(source, limits.file_bytes + 1):
                    n_bytes += len(piece)
                    limits.check("bytes", n_bytes, limits.file_bytes)
                    file.write(piece)

        _retried(write, "it")


def found_at(url: str, scratch: Path) -> tuple[RemoteFolder, dict[str, Stamp]]:
    """The folder at a URL, and stamps of all its files by name, hidden ones left out; of one file where it is one.

    Raises: UserError, if there is nothing, it may not be read, cannot be reached, or what reads it is not installed.
    """
    _transport.cache_clear()
    _listed.cache_clear()
    url = re.sub(r"^(zip|tar)://::", "", url)  # the archive itself, which is unpacked here as any other
    with _clear_errors(url):
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
        self.fs, self.root = fsspec.core.url_to_fs(url)
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
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self._base = urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/", "", ""))
        self._itself = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        self._query = f"?{parts.query}" if parts.query else ""
        self._user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if parts.username else ""

    def itself(self) -> Stamp | None:
        if self._itself.partition("?")[0].endswith("/"):
            return None
        with self._get(self._itself) as answer:
            if answer.headers.get_content_type() == "text/html":  # a listing
                return None
            return [_length(answer), answer.headers.get("ETag") or answer.headers.get("Last-Modified")]

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
                raise UserError(f"{self._base} lists more than {_MOST_FOLDERS:,} folders: give one with fewer")
        return {name: list(stamp) for name, stamp in found.items()}

    def listing(self, folder: str) -> dict[str, Stamp]:
        return {name: list(UNKNOWN) for name in self._links(folder)[0]}

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return self._get(self._base + quote(name) + self._query)

    def _links(self, folder: str) -> tuple[set[str], set[str]]:
        """Names of files and of folders in a folder."""
        page = self._base + (quote(folder) + "/" if folder else "")
        with self._get(page + self._query) as answer:
            data = b"".join(_pieces(answer, _LISTING_BYTES + 1))
        if len(data) > _LISTING_BYTES:
            raise UserError(f"{page} is a list of more than {_LISTING_BYTES >> 20} MB: give folders with fewer files")
        links = _Links()
        links.feed(data.decode("utf-8", "replace"))
        files: set[str] = set()
        folders: set[str] = set()
        for href in links.found:
            with contextlib.suppress(ValueError):
                place = urlunsplit(urlsplit(urljoin(page, href))._replace(query="", fragment=""))
                if place.startswith(page):
                    name = unquote(place[len(self._base) :])
                    if _is_inside(name.rstrip("/")):
                        (folders if name.endswith("/") else files).add(name.rstrip("/"))
        return files, folders - {folder}

    def _get(self, url: str) -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "shapeloom"})
        if self._user:
            # Not for where a redirection leads.
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(self._user.encode()).decode()}")
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            what = f"the server answers {error.code} {error.reason}"
            if error.code in (404, 410):
                raise FileNotFoundError(what) from None
            if error.code in (401, 403):
                raise PermissionError(what) from None
            raise (OSError if error.code in (408, 429) or error.code >= 500 else ValueError)(what) from None


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
    return _Http(url) if urlsplit(url).scheme in ("http", "https") else _Fsspec(url)


@lru_cache(maxsize=64)
def _listed(url: str, folder: str) -> dict[str, Stamp]:
    with _clear_errors(url):
        try:
            return _transport(url).listing(folder)
        except FileNotFoundError:
            return {}


# ---------------------------------------------------------------------------------------------------- when it fails


def _retried(action: Callable[[], Result], what: str) -> Result:
    """The result of `action`, tried again where that may help. Raises: Rejected."""
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            return action()
        except (Rejected, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
                raise
            if wait_s is None or not _may_pass(error):
                reason, hint = told(error, "")
                raise Rejected(f"{what} {reason}", hint, kind="unavailable") from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def _clear_errors(url: str) -> Iterator[None]:
    """Every store has exceptions of its own: here they become UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason, hint = told(error, urlsplit(url).scheme)
        raise UserError(f"{without_secrets(url)} {reason}: {hint}") from error


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)):
        return False
    return not _is_about_credentials(error)


def told(error: Exception, protocol: str) -> tuple[str, str]:
    """What went wrong, to be read after what it went wrong with, and what to do."""
    line = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, ImportError):
        package = _PACKAGES.get(protocol)
        return f"needs a package that is not installed ({line})", f"pip install {package}" if package else "install it"
    if isinstance(error, FileNotFoundError):
        return "is not there", "check its address"
    if isinstance(error, PermissionError) or _is_about_credentials(error):
        return f"may not be read ({line})", "check the credentials in the environment, and that they allow reading"
    if isinstance(error, ValueError) and "rotocol not known" in line:
        return "is of a kind that is not known", "use one that fsspec has, as s3://, gs://, https:// or sftp://"
    if isinstance(error, urllib.error.URLError):
        line = str(error.reason)[:160]
    return f"cannot be had ({type(error).__name__}: {line})", "check the address and the network"


def _is_about_credentials(error: Exception) -> bool:
    return re.search("Credential|Authentication|Forbidden|AccessDenied", type(error).__name__) is not None


# ----------------------------------------------------------------------------------------------------------- names


def _pieces(source: IO[bytes], most: int) -> Iterator[bytes]:
    """What a stream holds, at most so many bytes of it. Raises: ConnectionError if it ends before it should."""
    length, n_bytes = _length(source), 0
    while n_bytes < most and (piece := source.read(min(_PIECE, most - n_bytes))):
        n_bytes += len(piece)
        yield piece
    if n_bytes < min(length or 0, most):
        raise ConnectionError(f"it ends after {n_bytes:,} of {length:,} bytes")


def _length(source: Any) -> int | None:
    """What a stream that was just opened says of its bytes, if it does."""
    lengths = (getattr(source, name, None) for name in ("size", "length"))
    return next((length for length in lengths if type(length) is int), None)


def _split(url: str) -> tuple[str, str]:
    """The URL of a file's folder, and its name."""
    first, mark, chain = url.partition("::")
    is_http = urlsplit(url).scheme in ("http", "https")
    path, question, query = first.partition("?") if is_http else (first, "", "")
    folder, _, name = path.rpartition("/")
    return f"{folder}/{question}{query}{mark}{chain}", unquote(name) if is_http else name


def _is_inside(name: str) -> bool:
    return bool(name) and not re.search(r"[\0\\]", name) and not {"", ".", ".."} & set(name.split("/"))


def without_secrets(url: str) -> str:
    """A URL without what may be secret: passwords, and the query with its tokens."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])
