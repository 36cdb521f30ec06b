"""Objects to pictures by a protocol, kept by content: what was rendered once is not rendered again.

The renderer is the data's own (`data_pipes.render`), so a generated object and the truth differ by their shape and
colour and by nothing else. Rendering happens in worker processes with limits on time and memory: an object that takes
too long, or kills its process, is a failure of its own. Imports no torch.

In the cache an object has three files: KEY.png (shadings down, views across), KEY.webp (a thumbnail) and KEY.json,
which is written last and names the sha256 of each shading's pixels.

Shapes: V views, S pixels of a side.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...data_pipes import render as renderer
from ...data_pipes.limits import Rejected
from ...data_pipes.mesh import Mesh
from ...data_pipes.workers import Failed, isolated_map
from ...errors import UserError
from ...files import sha256_json, write_atomic, write_json
from ...progress import Bar
from .protocol import Protocol
from .sources import Loaded, MeshFile, Reading, Source

__all__ = ["Limits", "Miss", "RenderCache", "Rendered"]

SHADED = {"colour": "lit", "textureless": "textureless"}  # names in `data_pipes.render.Views`
THUMBNAIL = 112
THUMBNAIL_AZIMUTH = 20.0  # the view nearest to it is shown


@dataclass(frozen=True)
class Limits:
    """Of rendering one object: seconds of processor time, and bytes of its worker's address space."""

    cpu_s: int = 60
    memory_bytes: int = 4 << 30

    @property
    def wall_s(self) -> float:
        return 10.0 * self.cpu_s  # against what sleeps; a busy machine fails no object that a quiet one does


@dataclass(frozen=True)
class Miss:
    """Why an object has no pictures. kind: as in `schema.Failure`."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Rendered:
    """An object's pictures in the cache: `pixels`, sha256 by shading, of `views` views; or the miss that it is."""

    key: str
    views: int = 0
    pixels: dict[str, str] | None = None
    miss: Miss | None = None
    warnings: tuple[str, ...] = ()


MISSING = Rendered("", miss=Miss("missing", "there is no file for it"))


@dataclass(frozen=True)
class _Job:
    source: Source
    protocol: Protocol
    folder: str
    key: str


class RenderCache:
    """Renders by a protocol in a folder that runs may share."""

    def __init__(self, folder: Path, protocol: Protocol, limits: Limits | None = None) -> None:
        self.folder, self.protocol, self.limits = folder / "renders", protocol, limits or Limits()

    def render(self, sources: Sequence[Source | None], *, workers: int, description: str) -> list[Rendered]:
        """Pictures of every source, made where they are not there; None is a missing object."""
        found = [MISSING if source is None else self._find(source) for source in sources]
        todo = {one.key: source for one, source in zip(found, sources) if source and not (one.pixels or one.miss)}
        jobs = [_Job(source, self.protocol, str(self.folder), key) for key, source in todo.items()]
        made: dict[str, Rendered] = {}
        if jobs:
            results = isolated_map(
                _render,
                jobs,
                workers=workers,
                cpu_s=self.limits.cpu_s,
                wall_s=self.limits.wall_s,
                memory_bytes=self.limits.memory_bytes,
                prepare=renderer.prepare,
            )
            with Bar(len(jobs), description) as bar:
                for job, result in zip(jobs, results, strict=True):
                    if isinstance(result, OSError):  # the cache cannot be written; the objects are not to blame
                        raise result
                    made[job.key] = self._give_up(job.key, result) if isinstance(result, Failed) else result
                    bar.update(1)
        return [made.get(one.key, one) for one in found]

    def _give_up(self, key: str, failed: Failed) -> Rendered:
        """A worker that went over its limits is kept, until they are raised; one that died is tried again next time."""
        over = [word for word in ("took longer", "of memory") if word in failed.reason]
        rendered = Rendered(key, miss=Miss("timed out" if over == ["took longer"] else "crashed", failed.reason))
        if over:
            _keep(self.folder, rendered, Reading(), limits=self.limits)
        return rendered

    def pictures(self, rendered: Rendered) -> dict[str, np.ndarray]:
        """u8 [V, S, S, 3] by shading."""
        assert rendered.pixels is not None, "a miss has no pictures"
        size = self.protocol.resolution
        with Image.open(self._path(rendered.key, "png")) as image:
            strip = np.asarray(image.convert("RGB"))
        grid = strip.reshape(len(rendered.pixels), size, rendered.views, size, 3).swapaxes(1, 2)
        return dict(zip(rendered.pixels, grid))

    def thumbnail(self, rendered: Rendered) -> bytes | None:
        """A small WebP, or None for a miss."""
        path = self._path(rendered.key, "webp")
        return path.read_bytes() if rendered.pixels and path.is_file() else None

    def key(self, source: Source) -> str:
        """Of its pictures; equal for objects of equal bytes. Raises OSError as `Source.key`."""
        return sha256_json({**source.key(), "by": self.protocol.render_key})

    def _find(self, source: Source) -> Rendered:
        """What is kept of a source, without pixels and miss where it must be rendered."""
        try:
            key = self.key(source)
        except OSError as error:
            return Rendered("", miss=Miss("unreadable", f"it cannot be read ({error.strerror or error})"))
        try:
            kept = json.loads(self._path(key, "json").read_text())
            if kept["pixels"] and self._path(key, "png").stat().st_size != kept["bytes"]:
                return Rendered(key)
            if isinstance(source, MeshFile) and kept["sidecars"] != source.sidecars_now(kept["sidecars"]):
                return Rendered(key)
            if kept["limits"] and any(asdict(self.limits)[name] > most for name, most in kept["limits"].items()):
                return Rendered(key)
            miss = Miss(**kept["miss"]) if kept["miss"] else None
            return Rendered(key, int(kept["views"]), kept["pixels"], miss, tuple(kept["warnings"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Rendered(key)

    def _path(self, key: str, suffix: str) -> Path:
        return _path(self.folder, key, suffix)


def _path(folder: Path, key: str, suffix: str) -> Path:
    return folder / key[:2] / f"{key}.{suffix}"


def _render(job: _Job) -> Rendered | OSError:
    """Runs in a worker: load, draw, keep. An OSError is of the cache, and handed to the parent."""
    folder, reading = Path(job.folder), Reading()
    strip = thumbnail = b""
    try:
        pictures = _pictures(job.source.load(reading), job.protocol)
    except UserError as error:
        kind, reason = (error.kind, error.reason) if isinstance(error, Rejected) else ("unreadable", str(error))
        rendered = Rendered(job.key, miss=Miss(kind, reason))
    else:
        pixels = {name: hashlib.sha256(views.tobytes()).hexdigest() for name, views in pictures.items()}
        views = len(next(iter(pictures.values())))
        rows = [np.concatenate(list(views_VSS3), axis=1) for views_VSS3 in pictures.values()]
        # Level 1 is half as quick to write as raw bytes and a fifteenth of their size.
        strip = _encoded(np.concatenate(rows), "PNG", compress_level=1)
        thumbnail = _thumbnail(pictures["colour"], job.protocol)
        rendered = Rendered(job.key, views, pixels, warnings=tuple(reading.warnings))
    try:
        if strip:
            write_atomic(_path(folder, job.key, "png"), strip)
            write_atomic(_path(folder, job.key, "webp"), thumbnail)
        _keep(folder, rendered, reading, n_bytes=len(strip))
    except OSError as error:
        return OSError(error.errno, error.strerror, error.filename)
    return rendered


def _keep(
    folder: Path, rendered: Rendered, reading: Reading, *, n_bytes: int = 0, limits: Limits | None = None
) -> None:
    """Write an object's JSON. n_bytes: of its PNG; limits: those that it went over."""
    record: dict[str, Any] = {"views": rendered.views, "pixels": rendered.pixels, "bytes": n_bytes}
    record |= {"sidecars": reading.sidecars, "warnings": reading.warnings}
    record["miss"] = asdict(rendered.miss) if rendered.miss else None
    record["limits"] = asdict(limits) if limits else None
    write_json(_path(folder, rendered.key, "json"), record)


def _pictures(loaded: Loaded, protocol: Protocol) -> dict[str, np.ndarray]:
    """u8 [V, S, S, 3] by shading."""
    if loaded.pictures is not None:
        return {name: _sized(views, protocol.resolution) for name, views in loaded.pictures.items()}
    assert loaded.mesh is not None
    mesh = _placed(loaded.mesh, protocol)
    views = renderer.render(mesh, protocol.views(), samples_per_axis=protocol.samples_per_axis)
    return {name: renderer.composite(getattr(views, SHADED[name]), protocol.background) for name in protocol.shadings}


def _placed(mesh: Mesh, protocol: Protocol) -> Mesh:
    """In the object frame, as the protocol wants it."""
    if protocol.normalise == "none" or not len(mesh.faces):
        return mesh
    try:
        return mesh.normalised()[0]
    except ValueError as error:
        raise Rejected(str(error), kind="empty") from None


def _sized(views_VHW3: np.ndarray, size: int) -> np.ndarray:
    """Padded to a square on white and resized, antialiased."""
    if views_VHW3.shape[1:3] == (size, size):
        return views_VHW3
    side = max(views_VHW3.shape[1:3])
    resized = []
    for view_HW3 in views_VHW3:
        height, width = view_HW3.shape[:2]
        canvas = Image.new("RGB", (side, side), "white")
        canvas.paste(Image.fromarray(np.ascontiguousarray(view_HW3)), ((side - width) // 2, (side - height) // 2))
        resized.append(np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(resized)


def _thumbnail(views_VSS3: np.ndarray, protocol: Protocol) -> bytes:
    azimuths = np.asarray(protocol.cameras.azimuths_deg)[: len(views_VSS3)]
    nearest = int(np.abs((azimuths - THUMBNAIL_AZIMUTH + 180) % 360 - 180).argmin())
    image = Image.fromarray(views_VSS3[nearest])
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _encoded(np.asarray(image), "WEBP", quality=82, method=2)


def _encoded(image: np.ndarray, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **settings)
    return buffer.getvalue()
