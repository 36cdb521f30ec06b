"""One 3D file to the members of one raw sample: what a worker does."""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..files import canonical_json, sha256_file
from ..models.cameras import Cameras
from . import blender, sampling
from . import render as rendering
from .blender import BlenderSettings
from .captions import AssetText, caption_from_name
from .duplicates import signature
from .judging import JudgeSettings, findings, measure
from .licences import LicenceFilter
from .limits import Limits, Rejected, Sidecars
from .mesh import Mesh
from .places import Place
from .raw_sample import encode_raw_sample
from .read import read_mesh
from .render import Views, composite, render
from .rigs import RigSettings
from .sampling import DENSE_SAMPLES, EDGE_SHARE, Solid, sample_field, sample_surface
from .shards import split_of

__all__ = ["BuildSettings", "Built", "Job", "Refused", "Unchanged", "build_asset", "prepare", "with_text"]

DENSE_RANGE = (4096, DENSE_SAMPLES)  # few points need no fine search for the nearest triangle
PICTURE_SIDE = 192  # of what is kept of a file that was judged out


class BuildSettings(BaseModel):
    """What is made of each 3D file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_surface: int = Field(default=16384, ge=1, description="points on the surface")
    n_near: int = Field(default=8192, ge=0, description="signed distances near the surface")
    n_uniform: int = Field(default=8192, ge=0, description="signed distances everywhere")
    edge_share: float = Field(default=EDGE_SHARE, ge=0, le=1, description="of those near the surface, at sharp edges")
    n_views: int = Field(default=8, ge=0, le=100, description="rendered views")
    rig: RigSettings = Field(default=RigSettings(), description="where their cameras stand")
    image_size: int = Field(default=128, ge=1, le=4096, description="width and height of a view in pixels")
    samples_per_axis: int = Field(default=2, ge=1, le=16, description="samples per pixel along each axis")
    renderer: Literal["raster", "blender"] = Field(
        default="raster", description="blender: Cycles, slowly (paths traced)"
    )
    blender: BlenderSettings = Field(default=BlenderSettings(threads=1), description="how Blender renders")
    lit: bool = Field(default=True, description="store shaded views beside the unlit ones")
    seed: int = Field(default=0, ge=0, description="of points and cameras")
    shard_size: int = Field(default=64, ge=1, description="files per shard, rejected ones included")
    judge: JudgeSettings = Field(default=JudgeSettings(), description="what is worth a warning, or a rejection")


@dataclass(frozen=True)
class Job:
    """A file to build.

    before: sha256 of the file and of the files it names, as they were when it was built; if all are the same, nothing
        is done.
    """

    place: Place
    file: str
    uid: str
    text: AssetText
    settings: BuildSettings
    limits: Limits
    licences: LicenceFilter
    before: tuple[str, dict[str, str | None]] | None = None


@dataclass(frozen=True)
class Built:
    """A sample's members, and what is remembered of it."""

    members: dict[str, bytes]
    sha256: str
    sidecars: dict[str, list[Any]]  # by name: sha256 and stamp, both None where there is no such file
    warnings: int
    signature: list[float]  # rounded: its tolerances are larger


@dataclass(frozen=True)
class Refused:
    """Why there is no sample; with a picture (WebP) where it was the judge who said so."""

    rejected: Rejected
    sidecars: dict[str, list[Any]]
    picture: bytes | None = None


@dataclass(frozen=True)
class Unchanged:
    """The file has another date but the bytes it had."""

    sidecars: dict[str, list[Any]]


def build_asset(job: Job) -> Built | Refused | Unchanged:
    """Read, judge, sample, render and encode one file."""
    hashes: dict[str, str | None] = {}

    def sidecars() -> dict[str, list[Any]]:
        return {name: [sha256, job.place.sidecar_stamp(name)] for name, sha256 in hashes.items()}

    if refusal := job.place.refused or job.licences.refusal(job.text.licence):
        return Refused(refusal, {})
    try:
        with job.place.local(job.limits) as (path, root):
            sha256 = _sha256(path, job.limits)
            if job.before is not None and job.before[0] == sha256:
                beside = Sidecars(path, root, job.limits, job.place.fetch)
                if _same(beside, job.before[1]):
                    hashes = beside.hashes
                    return Unchanged(sidecars())
            warnings: list[str] = []
            mesh = read_mesh(path, job.limits, root=root, warnings=warnings, sidecars=hashes, fetch=job.place.fetch)
            named = sidecars()  # now: what is changed while the rest is done must be noticed the next time
    except Rejected as rejected:
        return Refused(rejected, sidecars())

    mesh, transform = mesh.normalised()
    settings = job.settings
    rng = np.random.Generator(np.random.Philox(key=_key(settings.seed, job.uid)))
    solid = Solid(mesh, int(np.clip(4 * (settings.n_surface + settings.n_near), *DENSE_RANGE)))
    views = cameras = None
    if settings.n_views:
        cameras = settings.rig.cameras(rng, settings.n_views, settings.image_size)
        try:
            views = _views(mesh, cameras, settings)
        except Rejected as rejected:
            return Refused(rejected, named)
        views = views if settings.lit else replace(views, lit=views.lit[:0])
    measures = measure(mesh, solid, transform, None if views is None else views.albedo[..., 3], settings.judge)
    found = findings(measures, settings.judge, warnings)
    for kind in settings.judge.reject:
        if kind in found:
            reason = Rejected(found[kind], f"mend it, or take '{kind}' out of judge.reject")
            return Refused(reason, named, None if views is None else _picture(views))
    warnings += [sentence for sentence in found.values() if sentence not in warnings]
    members = encode_raw_sample(
        job.uid,
        **_said(job.file, job.text),
        sha256=sha256,
        transform=transform,
        split=split_of(job.uid),
        surface=sample_surface(solid, settings.n_surface, rng),
        field=sample_field(solid, settings.n_near, settings.n_uniform, rng, settings.edge_share),
        views=views,
        cameras=cameras,
        extra={
            "file": job.file,
            "caption_from_name": not job.text.captions,
            "mesh": {
                "vertices": len(mesh.vertices),
                "faces": len(mesh.faces),
                "materials": len(mesh.materials),
                "hidden_share": round(solid.hidden_share, 4),
                "sheet_share": round(solid.sheet_share, 4),
                **measures.to_json(),
            },
            "warnings": warnings,
        },
    )
    return Built(members, sha256, named, len(warnings), [float(f"{x:.6g}") for x in signature(solid.mesh)])


def _views(mesh: Mesh, cameras: Cameras, settings: BuildSettings) -> Views:
    if settings.renderer == "blender":
        try:
            return blender.render(mesh, cameras, settings.blender)
        except UserError as error:  # of this machine's Blender, mostly: another may render it
            raise Rejected(str(error), "mend that, and build again", kind="unavailable") from error
    return render(mesh, cameras, samples_per_axis=settings.samples_per_axis)


def prepare() -> None:
    """Compile what `build_asset` runs on, where no earlier process has."""
    sampling.prepare()
    rendering.prepare()


def with_text(meta: dict[str, Any], file: str, text: AssetText) -> bytes:
    """A sample's json member with other words about it."""
    return canonical_json({**meta, **_said(file, text), "caption_from_name": not text.captions}).encode()


def _said(file: str, text: AssetText) -> dict[str, Any]:
    """The fields of the json member that come from the captions file."""
    return {
        "captions": list(text.captions) or [caption_from_name(file)],
        "category": text.category,
        "source": text.source or file,
        "licence": text.licence,
        "author": text.author,
    }


def _same(beside: Sidecars, before: dict[str, str | None]) -> bool:
    """Whether the files that a file names have the bytes they had."""
    for name in before:
        with contextlib.suppress(FileNotFoundError):
            beside.read(name)
    return beside.hashes == before


def _sha256(path: Path, limits: Limits) -> str:
    """Of the file; of nothing for one that `read_mesh` is going to refuse."""
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size <= limits.file_bytes:
            return sha256_file(path)
    return ""


def _key(seed: int, uid: str) -> int:
    """A 128-bit key that two samples share only if they share seed and uid."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{uid}".encode()).digest()[:16], "big")


def _picture(views: Views) -> bytes:
    picture = Image.fromarray(composite((views.lit if len(views.lit) else views.albedo)[0]))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
