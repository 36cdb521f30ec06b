"""Opens USD layers from outside so that nothing is read but what they may name.

USD by itself follows any path in a layer: absolute ones, "..", search paths, plug-ins' URLs. Here every layer is
opened alone, the layers it names are read through `Sidecars` (or from its .usdz package) and put in place of their
paths as layers without a file, and what is left is cut out. Only then is a stage composed, of which no path leads
anywhere any more.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from pxr import Sdf, Tf, Usd

from .limits import Limits, Rejected, Sidecars

__all__ = ["Layers"]

_LAYER_SUFFIXES = (".usd", ".usda", ".usdc")
_MOST_LAYERS = 1000
_Read = Callable[[str], bytes]  # a file by name; raises FileNotFoundError


class Layers:
    """The layers of one USD file, and the pictures that they name.

    Args:
        folder: a temporary one, which must stay as long as the layers are used.
    """

    def __init__(self, sidecars: Sidecars, limits: Limits, warnings: list[str], folder: Path) -> None:
        self._limits, self._warnings, self._folder = limits, warnings, folder
        self._sidecars = sidecars
        self._bytes_left = limits.file_bytes
        self._packages: dict[str, _Package] = {}
        self._opened: dict[tuple[int, str], Any] = {}
        self._homes: dict[str, tuple[_Read, str]] = {}  # by a layer's identifier: who reads what it names, its folder
        self._todo: list[Any] = []
        self.has_clips = False

    def root(self, data: bytes, suffix: str) -> Any:
        """The layer of the file's bytes, with all that it names in place. Raises: Rejected."""
        root = self._open(self._sidecars.read, f"itself{suffix}", data)
        while self._todo:
            self._settle(self._todo.pop())
        return root

    def asset(self, attribute: Any) -> tuple[str, bytes]:
        """Name and bytes of the file that an attribute names. Raises: FileNotFoundError; Rejected."""
        for spec in attribute.GetPropertyStack(Usd.TimeCode.Default()):
            if spec.HasInfo("default") and isinstance(spec.default, Sdf.AssetPath):
                path = spec.default.path
                read, folder = self._homes[spec.layer.identifier]
                if re.match(r"/|[A-Za-z]:[/\\]|[A-Za-z][A-Za-z0-9+.-]+:", path):
                    path = re.split(r"[/\\]", path)[-1]  # of a path on the exporter's machine the name alone
                read, name = self._place(read, folder, path)
                return path, read(name)
        raise FileNotFoundError("no file")

    def _open(self, read: _Read, name: str, data: bytes) -> Any:
        """A layer of bytes; what it names is settled later."""
        if name.lower().endswith(".usdz"):
            package = _Package(data, self._take)
            read, name, data = package.read, package.first, package.read(package.first)
        if len(self._homes) >= _MOST_LAYERS:
            raise Rejected(f"it is made of more than {_MOST_LAYERS:,} layers", "flatten it")
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in _LAYER_SUFFIXES:
            raise Rejected(f"it takes {name[:80]!r} for a USD layer, which has another format", "flatten it")
        path = self._folder / f"{len(self._homes)}{suffix}"
        path.write_bytes(data)
        try:
            layer = Sdf.Layer.OpenAsAnonymous(str(path))
        except Tf.ErrorException as error:
            what = " ".join(str(error).rpartition(" : ")[2].replace(str(path), "").split()).strip("' :")
            raise Rejected(f"its USD data cannot be read ({what[:120]})", "copy or download it again") from None
        self._homes[layer.identifier] = read, posixpath.dirname(name)
        self._todo.append(layer)
        return layer

    def _settle(self, layer: Any) -> None:
        """Put layers in place of the paths of a layer, and cut out what is missing."""
        read, folder = self._homes[layer.identifier]
        for path in sorted(set(layer.GetCompositionAssetDependencies())):
            layer.UpdateCompositionAssetDependency(path, self._named(read, folder, path))
        n_specs = 0

        def visit(path: Any) -> None:
            nonlocal n_specs
            n_specs += 1
            is_prim = path.IsPrimPath() or path.IsPrimVariantSelectionPath()
            prim = layer.GetPrimAtPath(path) if is_prim else None
            if prim and prim.HasInfo("clips"):  # values in yet other files, all of them animation
                self.has_clips = True
                prim.ClearInfo("clips")

        layer.Traverse(Sdf.Path.absoluteRootPath, visit)
        self._limits.check("parts in one layer", n_specs, 100 * self._limits.nodes)

    def _named(self, read: _Read, folder: str, path: str) -> str:
        """The identifier of the layer that a path names; "" where there is none."""
        if path.startswith("`"):
            self._warnings.append("a layer whose path is an expression was left out")
            return ""
        path, _ = Sdf.Layer.SplitIdentifier(path)
        if re.match(r"/|\\|[A-Za-z][A-Za-z0-9+.-]*:", path):
            raise Rejected(
                f"it names a file outside its folder ({path[:80]!r})", "put the layers beside it, or flatten it"
            )
        try:
            read, name = self._place(read, folder, path)
            key = id(read.__self__), name  # type: ignore[attr-defined]
            if key not in self._opened:
                self._opened[key] = self._open(read, name, read(name))
        except FileNotFoundError:
            self._warnings.append(f"the layer {path[:80]!r} is missing, so what it holds was left out")
            return ""
        return self._opened[key].identifier

    def _place(self, read: _Read, folder: str, path: str) -> tuple[_Read, str]:
        """Who reads what a path in a layer names, and by which name; a[b] is b in the package a."""
        outer, *inner = path.rstrip("]").split("[")
        name = posixpath.normpath(posixpath.join(folder, outer))
        for part in inner:
            if name not in self._packages:
                self._packages[name] = _Package(read(name), self._take)
            read, name = self._packages[name].read, part
        return read, name

    def _take(self, n_bytes: int) -> None:
        self._bytes_left -= n_bytes
        if self._bytes_left < 0:
            raise Rejected(f"it unpacks to more than the {self._limits.file_bytes:,} bytes allowed", "leave it out")


class _Package:
    """The files of a .usdz: a zip of files that are not compressed, of which the first is the scene."""

    def __init__(self, data: bytes, take: Callable[[int], None]) -> None:
        self._take = take
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise _broken(error) from None
        names = [info.filename for info in self._archive.infolist() if not info.is_dir()]
        if not names:
            raise Rejected("its USDZ package is empty", "export it again")
        self.first = names[0]
        self._names = set(names)

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError; Rejected."""
        if name.startswith(".."):
            raise Rejected(f"it names a file outside its package ({name[:80]!r})", "export it again")
        if name not in self._names:
            raise FileNotFoundError(name)
        info = self._archive.getinfo(name)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Rejected("its USDZ package is encrypted, or packed in a way that is not allowed", "export it again")
        self._take(info.file_size)
        try:
            with self._archive.open(info) as file:
                return file.read(info.file_size)  # never more than was counted, whatever the data say
        except Exception as error:  # zipfile and zlib promise no common class
            raise _broken(error) from None


def _broken(error: Exception) -> Rejected:
    return Rejected(f"its USDZ package cannot be read ({str(error)[:80]})", "copy or download it again")
