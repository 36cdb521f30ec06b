"""Addresses of files that are not on this machine: how they are opened, and what is said where that fails.

HTTP goes through the standard library: fsspec's needs one more package, reads a listing of any length, and the
library's own knows the environment's proxies. What fsspec finds by itself (keys in the environment or in its own
configuration) is how credentials get in; there are no options.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import io
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ..errors import UserError
from .sample_bytes import ByteSource

__all__ = [
    "HttpFolder",
    "as_user_errors",
    "is_full_disk",
    "is_http",
    "is_url",
    "length_of",
    "open_filesystem",
    "pieces",
    "retried",
    "told",
    "without_secrets",
]

Result = TypeVar("Result")

_PIECE = 1 << 20
TIMEOUT_S = 60.0  # a connection that says nothing for so long is broken
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a", "gs", "gcs"), "'shapeloom[remote]'"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("http", "https"), "aiohttp"),  # within a chain of fsspec's alone
    "hdfs": "pyarrow",
    "oss": "ossfs",
    "smb": "smbprotocol",
}


def is_url(folder: object) -> bool:
    """Whether it is a URL, or a chain of them as fsspec has it (zip://::https://…)."""
    return isinstance(folder, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", folder) is not None


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def without_secrets(url: str | Path) -> str:
    """A URL without what may be secret: passwords, and the query with its tokens."""
    return re.sub(r"//[^/]*@", "//", str(url).partition("?")[0])


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path in it.

    Raises: UserError for an unknown protocol, or one whose driver is not installed.
    """
    import fsspec

    with as_user_errors(without_secrets(url), url.partition("://")[0]):
        return fsspec.core.url_to_fs(url)


class HttpFolder:
    """A folder of a web server. What the URL's query says (a token, mostly) goes with every file.

    Raises: ValueError for a URL that is none.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        path = quote(parts.path, safe="/%:+,;=@!$&'()*~")  # as a browser does with what is typed
        self.base = urlunsplit((parts.scheme, host, path.rstrip("/") + "/", "", ""))
        self.itself = urlunsplit((parts.scheme, host, path, parts.query, ""))
        self._query = f"?{parts.query}" if parts.query else ""
        self._user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if parts.username else ""

    def address(self, name: str) -> str:
        return self.base + quote(name) + self._query

    def get(self, address: str, first: int = 0, size: int | None = None) -> Any:
        """The answer, to be read from byte `first` on; an empty one where that is behind the end.

        A server that knows no ranges sends all of it: what is before `first` is passed over, what is behind is not.

        Raises: FileNotFoundError, PermissionError; ValueError for what asking again will not change, else OSError.
        """
        request = urllib.request.Request(address, headers={"User-Agent": "shapeloom"})
        if first or size is not None:
            request.add_header("Range", f"bytes={first}-{'' if size is None else first + size - 1}")
        if self._user:
            # Not for where a redirection leads.
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(self._user.encode()).decode()}")
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            what = f"the server answers {error.code} {error.reason}"
            if error.code == 416:
                return io.BytesIO()
            if error.code in (404, 410):
                raise FileNotFoundError(what) from None
            if error.code in (401, 403):
                raise PermissionError(what) from None
            raise (OSError if error.code in (408, 429) or error.code >= 500 else ValueError)(what) from None
        if answer.status != 206:
            while first and (passed := len(answer.read(min(first, 1 << 20)))):
                first -= passed
        return answer


def pieces(source: ByteSource, most: float = math.inf) -> Iterator[bytes]:
    """What a stream that was just opened holds, at most so many bytes of it.

    Raises: ConnectionError if it ends before it should.
    """
    length, n_bytes = length_of(source), 0
    while n_bytes < most and (piece := source.read(int(min(_PIECE, most - n_bytes)))):
        n_bytes += len(piece)
        yield piece
    if n_bytes < min(length or 0, most):
        raise ConnectionError(f"it ends after {n_bytes:,} of {length:,} bytes")


def length_of(source: Any) -> int | None:
    """What a stream that was just opened says of its bytes, if it does."""
    lengths = (getattr(source, name, None) for name in ("size", "length"))
    return next((length for length in lengths if type(length) is int), None)


# ---------------------------------------------------------------------------------------------------- when it fails


@contextlib.contextmanager
def as_user_errors(what: str, protocol: str = "", *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Every store has exceptions of its own: here they become UserError about `what`, except those of `but`.

    A full disk is this machine's, and left alone too.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError, *but)) or is_full_disk(error):
            raise
        reason, hint = told(error, protocol)
        raise UserError(f"{what} {reason}: {hint}") from error


def is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def told(error: Exception, protocol: str = "") -> tuple[str, str]:
    """What went wrong, to be read after what it went wrong with, and what to do."""
    line = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, ImportError):
        package = _PACKAGES.get(protocol)
        return f"needs a package that is not installed ({line})", f"pip install {package}" if package else "install it"
    if isinstance(error, FileNotFoundError):
        return "is not there", "check its address"
    if isinstance(error, http.client.InvalidURL):  # its text has all of the address
        return "is no address", "write it as a browser shows it"
    if isinstance(error, PermissionError) or _is_about_credentials(error):
        return f"may not be read ({line})", "check the credentials in the environment, and that they allow reading"
    if isinstance(error, ValueError) and "rotocol not known" in line:
        return "is of a kind that is not known", "use one that fsspec has, as s3://, gs://, https:// or sftp://"
    if isinstance(error, urllib.error.URLError):
        line = str(error.reason)[:160]
    return f"cannot be had ({type(error).__name__}: {line})", "check the address and the network"


def retried(call: Callable[[], Result], pauses_s: Iterable[float]) -> Result:
    """`call()`, made again after each pause while it fails in a way that may pass. Raises what it last raised."""
    for pause in pauses_s:
        try:
            return call()
        except Exception as error:  # every network library has its own
            if not _may_pass(error):
                raise
            time.sleep(pause)
    return call()


def _may_pass(error: Exception) -> bool:
    lasting = (
        *(FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, http.client.InvalidURL),
        *(UserError, MemoryError),
    )
    if is_full_disk(error) or (isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG):
        return False
    return not isinstance(error, lasting) and not _is_about_credentials(error)


def _is_about_credentials(error: Exception) -> bool:
    return re.search("Credential|Authentication|Forbidden|AccessDenied", type(error).__name__) is not None
