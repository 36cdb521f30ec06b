"""A folder of 3D files to raw shards: `shapeloom data build`.

Every file is read, sampled and rendered in a worker process; one that cannot be is quarantined in `rejected.jsonl`
and the rest goes on. The bytes written depend on the files, the captions and `BuildSettings`, not on the number of
workers nor on where a run was interrupted.

The output folder holds, beside the shards and their manifest (shards.py), `rejected.jsonl` (file, reason, hint),
`attribution.csv` (who made what, under which licence) and `parts/`, one small JSON per shard from which the former
two are put together and by which an interrupted run goes on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..files import read_json, sha256_json, write_atomic, write_json
from ..progress import Bar
from .captions import AssetText, caption_from_name, count_repeated, read_captions
from .find import Place, find
from .judging import JudgeSettings, findings, measure
from .licences import LicenceFilter
from .limits import Limits, Rejected
from .read import read_mesh
from .render import random_rig, render
from .sampling import DENSE_SAMPLES, Solid, sample_field, sample_surface
from .shards import (
    RAW_FORMAT,
    ShardInfo,
    ShardWriter,
    begin_folder,
    encode_raw_sample,
    finished_shard,
    split_of,
    write_manifest,
)
from .survey import general_form
from .workers import Failed, isolated_map

__all__ = ["BuildReport", "BuildSettings", "Guard", "build"]

DENSE_RANGE = (4096, DENSE_SAMPLES)  # few points need no fine search for the nearest triangle
RECIPE = 2  # counted up when the same settings give other bytes


class BuildSettings(BaseModel):
    """What is made of each 3D file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_surface: int = Field(default=16384, ge=1, description="points on the surface")
    n_near: int = Field(default=8192, ge=0, description="signed distances near the surface")
    n_uniform: int = Field(default=8192, ge=0, description="signed distances everywhere")
    n_views: int = Field(default=8, ge=0, le=100, description="rendered views; the first half frontal")
    image_size: int = Field(default=128, ge=1, le=4096, description="width and height of a view in pixels")
    samples_per_axis: int = Field(default=2, ge=1, le=16, description="rays per pixel along each axis")
    lit: bool = Field(default=True, description="store shaded views beside the unlit ones")
    seed: int = Field(default=0, ge=0, description="of points and cameras")
    shard_size: int = Field(default=64, ge=1, description="files per shard, rejected ones included")
    judge: JudgeSettings = Field(default=JudgeSettings(), description="what is worth a warning, or a rejection")


@dataclass(frozen=True)
class Guard:
    """What one file may take before it is given up."""

    cpu_s: int = 60
    wall_s: float = 600.0
    memory_bytes: int = 4 << 30
    limits: Limits = Limits()


@dataclass(frozen=True)
class BuildReport:
    """What came of a build; `rejected` is a list of {file, reason, hint}."""

    files: int
    samples: int
    splits: dict[str, int]
    captions_from_names: int
    repeated_captions: int
    warnings: int
    rejected: list[dict[str, str]]
    kept_shards: int
    seconds: float
    assets_per_second_per_worker: float | None = field(compare=False)

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {self.splits[name]}" for name in ("train", "val", "test") if name in self.splits)
        lines = [f"{self.samples} of {self.files} files built ({splits})"]
        if self.assets_per_second_per_worker is not None:
            lines[0] += f" in {self.seconds:.0f} s, {self.assets_per_second_per_worker:.2f} a second and worker"
        if self.kept_shards:
            lines.append(f"{self.kept_shards} shards were there already")
        if self.captions_from_names:
            lines.append(
                f"{self.captions_from_names} captions were made of file names: give --captions for better ones"
            )
        if self.repeated_captions:
            lines.append(f"{self.repeated_captions} captions have the same words as another, so tell nothing apart")
        if self.warnings:
            have = "file has" if self.warnings == 1 else "files have"
            lines.append(f"{self.warnings} {have} warnings: see 'warnings' in their json, or data report")
        lines += [f"rejected: {count} because {reason}" for reason, count in self.rejected_by_reason().items()]
        return "\n".join(lines)

    def rejected_by_reason(self) -> dict[str, int]:
        """Reasons with their counts, most frequent first; numbers and names in them are left out."""
        return dict(Counter(general_form(entry["reason"]) for entry in self.rejected).most_common())


@dataclass(frozen=True)
class _Job:
    place: Place
    file: str
    uid: str
    text: AssetText
    settings: BuildSettings
    limits: Limits
    licences: LicenceFilter


@dataclass(frozen=True)
class _Built:
    members: dict[str, bytes]
    sha256: str
    warnings: int


def build(
    folder: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    settings: BuildSettings | None = None,
    workers: int = 1,
    *,
    limit: int | None = None,
    guard: Guard | None = None,
    licences: LicenceFilter | None = None,
) -> BuildReport:
    """Make raw shards of all 3D files under a folder. Run again after an interruption, it goes on where it was.

    Archives (.zip, .tar, .tar.gz, .tgz) are read as folders, for which they are unpacked into a temporary one (in
    TMPDIR), at each run.

    Args:
        captions: a captions file, CSV or JSONL (see captions.py); without one, or for files that it leaves out,
            captions are made of file names.
        workers: processes, one thread each.
        limit: only so many files, chosen at random by `settings.seed`.
        licences: files that it refuses are rejected, unread; all are taken by default.
    Raises: UserError for a missing or empty folder, a wrong captions file, an output folder that holds something
        else, or when not one file could be used.
    """
    folder, out = Path(folder), Path(out)
    settings, guard, licences = settings or BuildSettings(), guard or Guard(), licences or LicenceFilter()
    if workers < 1 or (limit is not None and limit < 1):
        raise UserError("workers and limit must be at least 1")
    with tempfile.TemporaryDirectory(prefix="shapeloom-archives-") as scratch:
        places = find(folder, out, Path(scratch))
        return _build(folder, out, places, captions, settings, workers, limit, guard, licences)


def _build(
    folder: Path,
    out: Path,
    places: dict[str, Place],
    captions: str | Path | None,
    settings: BuildSettings,
    workers: int,
    limit: int | None,
    guard: Guard,
    licences: LicenceFilter,
) -> BuildReport:
    """As `build`, of files that were found."""
    files = list(places)
    texts = read_captions(captions, files) if captions is not None else {}
    uids = _uids(files)
    if limit is not None and limit < len(files):
        chosen = np.random.default_rng(settings.seed).permutation(len(files))[:limit]
        files = [files[i] for i in sorted(chosen)]
    licences.check_given(text.licence for text in texts.values())
    identity = _identity(places, files, texts, settings, licences)
    begin_folder(out, format=RAW_FORMAT, settings=identity)
    jobs = [
        _Job(places[file], file, uids[file], texts.get(file, AssetText()), settings, guard.limits, licences)
        for file in files
    ]
    chunks = [jobs[start : start + settings.shard_size] for start in range(0, len(jobs), settings.shard_size)]
    parts, kept, seconds = _make_shards(out, chunks, workers, guard)
    report = _report(parts, kept, seconds, workers, texts)
    _write_summary(out, parts, report, identity)
    if not report.samples:
        first = report.rejected[0]
        raise UserError(
            f"none of the {len(files)} files in {folder} could be used, the first, {first['file']}, because "
            f"{first['reason']}; {out / 'rejected.jsonl'} lists them all"
        )
    return report


def _uids(files: list[str]) -> dict[str, str]:
    """A WebDataset key for each file: its path without suffix, plus a hash where that is not unique or too long."""
    plain = {file: re.sub(r"[^A-Za-z0-9_-]", "_", file.rpartition(".")[0].replace("/", "__")) for file in files}
    count = Counter(plain.values())

    def unique(file: str, uid: str) -> str:
        if count[uid] == 1 and len(uid) <= 150:
            return uid
        return f"{uid[:150]}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"

    return {file: unique(file, uid) for file, uid in plain.items()}


def _identity(
    places: dict[str, Place],
    files: list[str],
    texts: dict[str, AssetText],
    settings: BuildSettings,
    licences: LicenceFilter,
) -> dict[str, Any]:
    """Everything the bytes depend on; files by name and size, since hashing them all would read them twice."""
    listing = [(file, places[file].path.stat().st_size, asdict(texts.get(file, AssetText()))) for file in files]
    return {
        "maker": "data build",
        "recipe": RECIPE,
        **settings.model_dump(mode="json"),
        **({"licences": licences.identity()} if licences else {}),
        "dataset": f"{len(files)} files {sha256_json(listing)[:16]}",
    }


# ------------------------------------------------------------------------------------------------------- one file


def _build_asset(job: _Job) -> _Built | Rejected:
    """Runs in a worker."""
    if job.place.refused is not None:
        return job.place.refused
    if refusal := job.licences.refusal(job.text.licence):
        return refusal
    warnings: list[str] = []
    try:
        mesh = read_mesh(job.place.path, job.limits, root=job.place.root, warnings=warnings)
    except Rejected as rejected:
        return rejected
    mesh, transform = mesh.normalised()
    settings = job.settings
    rng = np.random.Generator(np.random.Philox(key=_key(settings.seed, job.uid)))
    solid = Solid(mesh, int(np.clip(4 * (settings.n_surface + settings.n_near), *DENSE_RANGE)))
    views = cameras = None
    if settings.n_views:
        cameras = random_rig(rng, settings.n_views, settings.image_size)
        views = render(mesh, cameras, samples_per_axis=settings.samples_per_axis)
        views = views if settings.lit else replace(views, lit=views.lit[:0])
    measures = measure(mesh, solid, transform, None if views is None else views.albedo[..., 3], settings.judge)
    found = findings(measures, settings.judge)
    for kind in settings.judge.reject:
        if kind in found:
            return Rejected(found[kind], f"mend it, or take '{kind}' out of judge.reject")
    warnings += found.values()
    sha256 = hashlib.sha256(job.place.path.read_bytes()).hexdigest()
    members = encode_raw_sample(
        job.uid,
        captions=_captions(job.file, job.text),
        category=job.text.category,
        source=job.text.source or job.file,
        licence=job.text.licence,
        author=job.text.author,
        sha256=sha256,
        transform=transform,
        split=split_of(job.uid),
        surface=sample_surface(solid, settings.n_surface, rng),
        field=sample_field(solid, settings.n_near, settings.n_uniform, rng),
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
    return _Built(members, sha256, len(warnings))


def _captions(file: str, text: AssetText) -> list[str]:
    return list(text.captions) or [caption_from_name(file)]


def _key(seed: int, uid: str) -> int:
    """A 128-bit key that two samples share only if they share seed and uid."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{uid}".encode()).digest()[:16], "big")


# --------------------------------------------------------------------------------------------------- all the files


def _make_shards(
    out: Path, chunks: list[list[_Job]], workers: int, guard: Guard
) -> tuple[list[dict[str, Any]], int, float]:
    """Write the shards that are not there yet. Returns all parts, how many were there, and the seconds it took."""
    parts = {k: part for k in range(len(chunks)) if (part := _finished_part(out, k)) is not None}
    kept = len(parts)
    todo = [k for k in range(len(chunks)) if k not in parts]
    jobs = [job for k in todo for job in chunks[k]]
    started = time.monotonic()
    results = isolated_map(
        _build_asset,
        jobs,
        workers=workers,
        cpu_s=guard.cpu_s,
        wall_s=guard.wall_s,
        memory_bytes=guard.memory_bytes,
    )
    total = sum(len(chunk) for chunk in chunks)
    with Bar(total, "building", start=total - len(jobs)) as bar:
        for k in todo:
            parts[k] = _make_shard(out, k, chunks[k], results, bar)
    return [parts[k] for k in sorted(parts)], kept, time.monotonic() - started


def _make_shard(
    out: Path, k: int, chunk: list[_Job], results: Iterator[_Built | Rejected | Failed], bar: Bar
) -> dict[str, Any]:
    """Write shard k and its part (a shard without samples is left out of the manifest)."""
    part: dict[str, Any] = {"samples": [], "rejected": [], "shard": None}
    with ShardWriter(_shard_path(out, k)) as writer:
        for job in chunk:
            result = next(results)
            if isinstance(result, _Built):
                writer.write(job.uid, result.members, split_of(job.uid))
                part["samples"].append(_row(job, result))
            else:
                hint = result.hint if isinstance(result, Rejected) else "open it in a 3D editor and export it again"
                part["rejected"].append({"file": job.file, "reason": result.reason, "hint": hint})
            bar.update(1)
        # Before the shard is renamed into place: a finished shard always has its part.
        write_json(_part_path(out, k), part)
    return part | {"shard": writer.info}


def _row(job: _Job, built: _Built) -> dict[str, Any]:
    return {
        "uid": job.uid,
        "file": job.file,
        "source": job.text.source,
        "licence": job.text.licence,
        "author": job.text.author,
        "sha256": built.sha256,
        "captions_from_name": not job.text.captions,
        "warnings": built.warnings,
    }


def _shard_path(out: Path, k: int) -> Path:
    return out / f"shard-{k:05d}.tar"


def _part_path(out: Path, k: int) -> Path:
    return out / "parts" / f"shard-{k:05d}.json"


def _finished_part(out: Path, k: int) -> dict[str, Any] | None:
    info = finished_shard(_shard_path(out, k))
    if info is None:
        return None
    try:
        part = read_json(_part_path(out, k), "the record of a shard")
    except UserError:
        return None
    return part | {"shard": info} if isinstance(part, dict) and len(part.get("samples", [])) == info.samples else None


def _report(
    parts: list[dict[str, Any]], kept: int, seconds: float, workers: int, texts: dict[str, AssetText]
) -> BuildReport:
    rows = [row for part in parts for row in part["samples"]]
    rejected = [entry for part in parts for entry in part["rejected"]]
    made = sum(len(part["samples"]) + len(part["rejected"]) for part in parts[kept:])
    return BuildReport(
        files=len(rows) + len(rejected),
        samples=len(rows),
        splits=dict(Counter(split_of(row["uid"]) for row in rows)),
        captions_from_names=sum(row["captions_from_name"] for row in rows),
        repeated_captions=count_repeated(
            caption for row in rows for caption in _captions(row["file"], texts.get(row["file"], AssetText()))
        ),
        warnings=sum(row["warnings"] > 0 for row in rows),
        rejected=rejected,
        kept_shards=kept,
        seconds=seconds,
        assets_per_second_per_worker=made / seconds / workers if made and seconds > 0 else None,
    )


def _write_summary(out: Path, parts: list[dict[str, Any]], report: BuildReport, identity: dict[str, Any]) -> None:
    """rejected.jsonl, attribution.csv, and last the manifest that makes the folder complete."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in report.rejected]
    write_atomic(out / "rejected.jsonl", "".join(lines))
    table = io.StringIO()
    columns = ["uid", "file", "source", "licence", "author", "sha256"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for part in parts for row in part["samples"])
    write_atomic(out / "attribution.csv", table.getvalue())
    shards: list[ShardInfo] = [part["shard"] for part in parts if part["samples"]]
    counts = {"samples": report.samples, **report.splits, "rejected": len(report.rejected)}
    extra = {"captions_from_names": report.captions_from_names}
    complete = report.samples > 0
    write_manifest(
        out, format=RAW_FORMAT, settings=identity, shards=shards, counts=counts, extra=extra, complete=complete
    )
