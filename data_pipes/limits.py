"""What a 3D file from outside may take, and how it is refused."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from ..errors import UserError

__all__ = ["ANIMATED", "Fetch", "Limits", "Rejected", "Sidecars", "decode_image"]

# (name below the root, most) -> what is there, None if nothing; more than `most` bytes may be cut to `most` + 1.
Fetch = Callable[[str, int], "bytes | None"]

ANIMATED = "it is animated: its rest pose is taken"  # a warning that every format words alike
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "GIF", "TIFF")


class Rejected(UserError):
    """A 3D file that is left out, with one sentence saying why and one saying what would help.

    kind: "empty" (no surface), "not finite" (coordinates that are no numbers), "unavailable" (it cannot be had now, and
        may be had another time) or "unreadable" (all else).
    """

    def __init__(
        self, reason: str, hint: str = "open it in a 3D editor and export it again", *, kind: str = "unreadable"
    ) -> None:
        super().__init__(f"{reason}: {hint}")
        self.reason, self.hint, self.kind = reason, hint, kind

    def __reduce__(self) -> tuple:
        # The default would call it with the joined message alone.
        return partial(Rejected, kind=self.kind), (self.reason, self.hint)


@dataclass(frozen=True)
class Limits:
    """The most that one 3D file may hold; generous for single objects, small enough for one worker's memory.

    Args:
        file_bytes: of the file, and of all files it names together.
        vertices, faces: after every instance in the scene is placed.
        texture_pixels: of all its textures together.
        nodes: of its scene graph.
    """

    file_bytes: int = 256 << 20
    vertices: int = 4_000_000
    faces: int = 4_000_000
    texture_pixels: int = 1 << 26
    nodes: int = 100_000

    def check(self, what: str, found: int, allowed: int) -> None:
        """Raise Rejected if there is too much of something."""
        if found > allowed:
            raise Rejected(f"it has {found:,} {what}, more than the {allowed:,} allowed", "simplify it or leave it out")


class Sidecars:
    """Read access to the files that a 3D file names: only inside `root`, with a limit on bytes.

    A name never leads to the network. Where the 3D file itself came from there, `fetch` is asked for files inside
    `root` that are not on this disk.

    hashes: of what was asked for so far, sha256 by name; None for a file that is not there.
    """

    def __init__(self, path: Path, root: Path | None, limits: Limits, fetch: Fetch | None = None) -> None:
        self.folder = path.parent.resolve()
        self.root = (root or path.parent).resolve()
        self._fetch = fetch
        self._left = limits.file_bytes
        self.hashes: dict[str, str | None] = {}

    def read(self, name: str) -> bytes:
        """The bytes of a file named relative to the 3D file.

        Raises: FileNotFoundError if there is none; Rejected if it lies outside or is too large.
        """
        tried = dict.fromkeys((self._inside(name), self._inside(unquote(name).replace("\\", "/"))))
        data = next((found for path in tried if (found := self._bytes(path)) is not None), None)
        if data is None:
            self.hashes[name] = None
            raise FileNotFoundError(name)
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        return data

    def _bytes(self, path: Path) -> bytes | None:
        """What is at a path inside the root; None if nothing is."""
        if path.is_file():
            self._take(path.stat().st_size)
            return path.read_bytes()
        if self._fetch is None or path == self.root:
            return None
        data = self._fetch(path.relative_to(self.root).as_posix(), self._left)
        self._take(0 if data is None else len(data))
        return data

    def _take(self, n_bytes: int) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise Rejected("the files it names are too large together", "leave it out")

    def _inside(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if "\0" in name or not path.is_relative_to(self.root):
            raise Rejected(
                f"it names a file outside its folder ({name[:80]!r})", "put textures and buffers beside the 3D file"
            )
        return path


def decode_image(data: bytes, pixels_left: int) -> np.ndarray:
    """A picture as uint8 [H, W, 4].

    Raises: Rejected if it has more than `pixels_left` pixels (found before decoding); OSError or ValueError if it is
    not a picture that can be read.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > pixels_left:
            raise Rejected(f"its textures are too large ({image.width} x {image.height})", "make the textures smaller")
        return np.asarray(image.convert("RGBA"))
