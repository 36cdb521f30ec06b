"""Sampling from a pipeline: for a person (`sample`: files and a contact sheet) and for the scores (`generate`).

Shapes: K objects, L latents of C channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..checkpoints.meshes import write_glb
from ..data_pipes.contact_sheet import write_png
from ..data_pipes.render import composite, render
from ..errors import UserError
from ..files import sha256_file, write_json
from ..models.cameras import orbit
from ..models.mesh import ExtractedMesh, extract_mesh
from ..models.pipeline import ShapeloomPipeline
from ..progress import Bar
from .meshes import is_empty, to_mesh
from .picture_files import open_picture
from .sheets import Cell, contact_sheet

__all__ = ["Request", "generate", "generate_batch", "sample"]

SAMPLES_FORMAT = "shapeloom-samples/1"
PICTURE_SIZE = 256
PICTURE_VIEW = (20.0, 20.0)  # azimuth, elevation in degrees
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
VIEWS_SHOWN = 4
LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Request:
    """One object to make: a text, pictures of it (views, in any order) or both, and its seed."""

    seed: int
    text: str | None = None
    views: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class _Given:
    """What shows one object: a picture file, or a folder of its views; the hash of the file, or of each."""

    path: Path
    views: tuple[Image.Image, ...]
    sha256: str | list[str]

    @property
    def name(self) -> str:
        return self.path.absolute().name  # that of "." is empty


def generate(
    pipe: ShapeloomPipeline, requests: Sequence[Request], *, batch_size: int = 16, **settings: Any
) -> Iterator[np.ndarray]:
    """Latents f32 [B, L, C] of one batch of requests after the other, in their order.

    Args:
        requests: neighbours of a kind (text, pictures, both) share a batch.
        settings: of `ShapeloomPipeline.generate_latents`: steps, text_guidance, image_guidance and so on.
    """
    start = 0
    while start < len(requests):
        stop = start + 1
        while stop < min(len(requests), start + batch_size) and _kind(requests[stop]) == _kind(requests[start]):
            stop += 1
        batch, (with_text, with_views) = requests[start:stop], _kind(requests[start])
        latents_BLC = pipe.generate_latents(
            [request.text for request in batch] if with_text else None,
            None,
            [request.seed for request in batch],
            images=[list(request.views) for request in batch] if with_views else None,
            **settings,
        )
        yield latents_BLC.float().cpu().numpy()
        start = stop


def generate_batch(
    pipe: ShapeloomPipeline,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    resolution: int = 64,
    description: str = "sampling",
    **settings: Any,
) -> list[ExtractedMesh]:
    """A mesh for each request (settings as in `generate`), under a progress bar."""
    meshes: list[ExtractedMesh] = []
    with Bar(len(requests), description) as bar:
        show = lambda step: bar.update(0, step=step + 1)  # noqa: E731 - a large model takes minutes an object
        for latents_BLC in generate(pipe, requests, batch_size=batch_size, on_step=show, **settings):
            meshes += extract_mesh(pipe.decode(torch.from_numpy(latents_BLC)), resolution)
            bar.update(len(latents_BLC))
    return meshes


def sample(
    pipeline: str | Path | ShapeloomPipeline,
    texts: Sequence[str] = (),
    images: Sequence[str | Path] = (),
    seeds: Sequence[int] = (0,),
    out: str | Path = "samples",
    *,
    text_guidance: float = 3.0,
    image_guidance: float = 2.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    steps: int = 24,
    resolution: int = 64,
    solver: str = "own",
    device: str | None = None,
) -> dict[str, Any]:
    """Make objects and write a GLB and a PNG of each, `contact_sheet.png` and `samples.json` into `out`.

    With texts and images, every text is combined with every image.

    Args:
        pipeline: a pipeline folder (or a loaded pipeline).
        images: a picture file each, or a folder whose pictures (PNG, JPEG, WebP) are views of one object;
            transparency is put on white, and they are padded to a square.
        seeds: one object for each condition and seed.
        guidance_interval, guidance_rescale: as in `ShapeloomPipeline.__call__`.
    Returns: what samples.json holds.
    Raises: UserError for an empty text, a file that is no picture, a folder without one, nothing to condition on, no
        seed, or settings out of range; and for whatever is wrong with the pipeline folder.
    """
    texts = [_checked_text(text) for text in texts]
    if not texts and not images:
        raise UserError('nothing to make: give --text "a red cube", or --image picture.png, or both')
    if not seeds:
        raise UserError("no seed to sample with: give at least one, for example --seeds 0-3")
    if steps < 1 or resolution < 4:
        raise UserError(f"steps must be at least 1 and resolution at least 4, got {steps} and {resolution}")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"the guidance interval is two levels in [0, 1], the lower first, got {low} and {high}")
    if not 0 <= guidance_rescale <= 1:
        raise UserError(f"the guidance rescale must be between 0 and 1, got {guidance_rescale}")
    out = Path(out)
    if any(Path(image).resolve() == out.resolve() for image in images):
        raise UserError(f"--out {out} is an --image too: write to another folder, or the results become views of it")
    pictures = [_given(Path(image)) for image in images]
    pipe = _loaded(pipeline, device)
    no_text: list[str | None] = [None]
    no_picture: list[_Given | None] = [None]
    conditions = [(text, picture) for text in texts or no_text for picture in pictures or no_picture]
    names = _names(conditions)
    requests = [Request(seed, text, picture.views if picture else ()) for text, picture in conditions for seed in seeds]
    settings: dict[str, Any] = {"steps": steps, "text_guidance": text_guidance, "image_guidance": image_guidance}
    settings |= {"guidance_interval": [low, high], "guidance_rescale": guidance_rescale, "solver": solver}
    meshes = generate_batch(pipe, requests, batch_size=8, resolution=resolution, **settings)

    samples, cells = [], []
    labels = [(name, *condition, seed) for name, condition in zip(names, conditions, strict=True) for seed in seeds]
    for (name, text, picture, seed), mesh in zip(labels, meshes, strict=True):
        stem = f"{name}-{seed}"
        image = _picture(mesh)
        write_png(out / f"{stem}.png", Image.fromarray(image))
        entry: dict[str, Any] = {"text": text, "image": str(picture.path) if picture else None, "seed": seed}
        entry |= {"image_sha256": picture.sha256 if picture else None, "empty": is_empty(mesh)}
        entry |= {"png": f"{stem}.png", "glb": None, "vertices": len(mesh.vertices), "faces": len(mesh.faces)}
        # JSON has no number for what is not finite.
        entry |= {"sdf_range": [round(value, 4) if isfinite(value) else None for value in mesh.sdf_range]}
        if not is_empty(mesh):
            write_glb(out / f"{stem}.glb", mesh)
            entry["glb"] = f"{stem}.glb"
        samples.append(entry)
        views = picture.views[:VIEWS_SHOWN] if picture else ()
        given = [np.asarray(ImageOps.pad(view, (PICTURE_SIZE,) * 2, color="white")) for view in views]
        label = text or (picture.name if picture else "")
        cells.append(Cell([*given, image], f"{label}  · seed {seed}" + ("  (empty)" if is_empty(mesh) else "")))
    columns = len(seeds) * max(1, 4 // len(seeds))  # a caption's seeds stay in one row
    write_png(out / "contact_sheet.png", contact_sheet(cells, columns=columns, size=160))
    record = {
        "format": SAMPLES_FORMAT,
        "pipeline": str(pipeline) if isinstance(pipeline, (str, Path)) else None,
        "conditioner_hash": pipe.conditioner.weights_hash,
        "settings": {**settings, "resolution": resolution},
        "samples": samples,
    }
    write_json(out / "samples.json", record)
    _tell(out, samples)
    return record


def slug(text: str) -> str:
    """A short file name: 'A red cube, left of …' -> 'a-red-cube-left-of'."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:60].rstrip("-") or "object"


def _checked_text(text: str) -> str:
    if not text.strip():
        raise UserError('--text is empty: describe an object, for example --text "a red cube"')
    if len(text) > LONGEST_TEXT:
        raise UserError(f"--text is {len(text)} characters long; at most {LONGEST_TEXT} are taken")
    return text.strip()


def _loaded(pipeline: str | Path | ShapeloomPipeline, device: str | None) -> ShapeloomPipeline:
    if isinstance(pipeline, (str, Path)):
        from ..checkpoints.pipeline import load

        pipeline = load(pipeline)
    return pipeline.to(device) if device else pipeline


def _given(path: Path) -> _Given:
    if not path.is_dir():
        return _Given(path, (open_picture(path),), sha256_file(path))
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not files:
        raise UserError(f"image folder {path} has no picture: put views of one object there, as PNG, JPEG or WebP")
    return _Given(path, tuple(map(open_picture, files)), [sha256_file(file) for file in files])


def _names(conditions: Sequence[tuple[str | None, _Given | None]]) -> list[str]:
    """A distinct file name for each condition."""
    names: list[str] = []
    for text, picture in conditions:
        base = "-".join(slug(part) for part in (text, picture and Path(picture.name).stem) if part)
        name, number = base, 1
        while name in names:
            number += 1
            name = f"{base}-v{number}"
        names.append(name)
    return names


def _kind(request: Request) -> tuple[bool, bool]:
    return request.text is not None, bool(request.views)


def _picture(mesh: ExtractedMesh) -> np.ndarray:
    """The object as a person sees it: u8 [256, 256, 3], lit, on white."""
    if is_empty(mesh):
        return np.full((PICTURE_SIZE, PICTURE_SIZE, 3), 255, np.uint8)
    cameras = orbit([PICTURE_VIEW[0]], PICTURE_VIEW[1], size=PICTURE_SIZE)
    return composite(render(to_mesh(mesh), cameras, samples_per_axis=3).lit)[0]


def _tell(out: Path, samples: Sequence[dict[str, Any]]) -> None:
    made = [entry for entry in samples if not entry["empty"]]
    print(f"{len(made)} of {len(samples)} objects written to {out}/ (GLB and PNG); see {out}/contact_sheet.png")
    for entry in samples:
        if entry["empty"]:
            what = entry["text"] or entry["image"]
            low, high = ("not finite" if value is None else f"{value:.3g}" for value in entry["sdf_range"])
            print(
                f"  {what!r} with seed {entry['seed']}: no surface: signed distance lies in [{low}, {high}]; "
                "try another seed or a lower guidance"
            )
