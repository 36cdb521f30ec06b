"""Objects to embeddings: generate, decode, render, embed, with everything slow kept so that a second run is quick.

Shapes: K objects, V views, L latents of C channels, D embedding width.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data_pipes.raw_sample import decode_npz, encode_npz
from ..data_pipes.shards import ShardFolder
from ..errors import UserError
from ..files import sha256_json, write_atomic
from ..models.autoencoder import Autoencoder
from ..models.conditioner import Conditioner
from ..models.mesh import ExtractedMesh, extract_mesh
from ..progress import Bar
from .renders import DEFAULT_SIZE, is_empty, render_meshes
from .stored import encode_stored

__all__ = ["Cache", "Clock", "Embedded", "Judge", "decode_meshes", "embed_meshes", "embed_pictures"]

CHUNK = 32  # objects decoded, rendered and embedded at a time
THUMBNAIL_VIEW = 2  # of the protocol: 10 degrees to the right


class Clock:
    """Wall seconds per kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began

    def to_json(self) -> dict[str, float]:
        return {what: round(seconds, 2) for what, seconds in self.seconds.items()}


class Cache:
    """Arrays kept in files named by what they depend on; a damaged file is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, name: str, key: dict[str, Any], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of `make`, from the file of an earlier call with the same name and key where there is one."""
        path = self.folder / f"{name}-{sha256_json(key)[:16]}.npz"
        if path.exists():
            try:
                return decode_npz(path.read_bytes(), str(path))
            except UserError:
                pass
        arrays = make()
        write_atomic(path, encode_npz(compressed=False, **arrays))
        return arrays


@dataclass(frozen=True)
class Judge:
    """The CLIP that scores, never the one that conditions."""

    model: Conditioner
    clock: Clock = field(default_factory=Clock)

    @property
    def size(self) -> int:
        return int(getattr(self.model, "image_size", None) or DEFAULT_SIZE)

    def texts(self, captions: Sequence[str], batch: int = 256) -> dict[str, np.ndarray]:
        """Each distinct caption's unit embedding [D]."""
        distinct = list(dict.fromkeys(captions))
        with self.clock("embed"), torch.inference_mode():
            rows = [self.model.encode_text(distinct[i : i + batch]).pooled for i in range(0, len(distinct), batch)]
            return dict(zip(distinct, _unit(torch.cat(rows).float().cpu().numpy()), strict=True))

    def pictures(self, images_NHW3: np.ndarray, batch: int = 256) -> np.ndarray:
        """Unit embeddings [N, D] of u8 pictures."""
        with self.clock("embed"), torch.inference_mode():
            parts = [self.model.encode_image(images_NHW3[i : i + batch]) for i in range(0, len(images_NHW3), batch)]
            return _unit(torch.cat([part.pooled for part in parts]).float().cpu().numpy())


@dataclass(frozen=True)
class Embedded:
    """K objects as the judge sees them: unit embeddings f32 [K, D], empty bool [K], a u8 picture each [K, H, W, 3]."""

    embeddings: np.ndarray
    empty: np.ndarray
    thumbnails: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return {"embeddings": self.embeddings, "empty": self.empty, "thumbnails": self.thumbnails}


def embed_meshes(
    chunks: Iterable[Sequence[Any]], total: int, judge: Judge, *, pool: Executor | None, description: str
) -> Embedded:
    """Render and embed objects that come in chunks; with a pool, rendering goes on while the next chunk is made.

    Args:
        chunks: lists of meshes (None or a mesh without faces is an empty object).
        total: number of objects, for the progress bar.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    empty: list[bool] = []
    with Bar(total, description) as bar:

        def take(pictures: Iterator[np.ndarray]) -> None:
            with judge.clock("render"):
                images_KVHW3 = np.stack(list(pictures))
            embeddings = judge.pictures(images_KVHW3.reshape(-1, *images_KVHW3.shape[2:]))
            parts.append((_mean_of_views(embeddings, images_KVHW3.shape[1]), images_KVHW3[:, THUMBNAIL_VIEW]))
            bar.update(len(images_KVHW3))

        waiting = None
        for meshes in chunks:
            empty += [is_empty(mesh) for mesh in meshes]
            pictures = render_meshes(meshes, size=judge.size, pool=pool)
            if waiting is not None:
                take(waiting)
            waiting = pictures
        if waiting is not None:
            take(waiting)
    embeddings, thumbnails = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Embedded(embeddings, np.array(empty, bool), thumbnails)


def embed_pictures(per_object: Sequence[np.ndarray], judge: Judge) -> Embedded:
    """Objects known by stored pictures alone: u8 [V, H, W, 3] each, V may differ."""
    resized = [np.asarray(judge_sized(images, judge.size)) for images in per_object]
    embeddings = judge.pictures(np.concatenate(resized))
    ends = np.cumsum([len(images) for images in resized])[:-1]
    means = np.concatenate([_mean_of_views(part, len(part)) for part in np.split(embeddings, ends)])
    return Embedded(means, np.zeros(len(resized), bool), np.stack([images[0] for images in resized]))


def decode_meshes(
    autoencoder: Autoencoder, latents_KLC: np.ndarray, resolution: int, clock: Clock
) -> Iterator[list[ExtractedMesh]]:
    """Meshes of latents, a chunk at a time."""
    for start in range(0, len(latents_KLC), CHUNK):
        with clock("decode"), torch.inference_mode():
            z_BLC = torch.from_numpy(latents_KLC[start : start + CHUNK]).to(autoencoder.device)
            meshes = extract_mesh(autoencoder.decode(z_BLC), resolution)
        yield meshes


def encode_surfaces(autoencoder: Autoencoder, folder: ShardFolder, indices: Sequence[int], clock: Clock) -> np.ndarray:
    """Latents f32 [K, L, C] of stored samples, without noise."""
    rows = []
    for start in range(0, len(indices), CHUNK):
        with clock("encode"):
            z_BLC = encode_stored(autoencoder, folder, indices[start : start + CHUNK])
        rows.append(z_BLC.float().cpu().numpy())
    return np.concatenate(rows)


def judge_sized(images_VHW3: np.ndarray, size: int) -> np.ndarray:
    """u8 pictures at the judge's size (antialiased)."""
    from PIL import Image

    if images_VHW3.shape[1:3] == (size, size):
        return images_VHW3
    pictures = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images_VHW3]
    return np.stack([np.asarray(picture) for picture in pictures])


def _mean_of_views(embeddings_ND: np.ndarray, views: int) -> np.ndarray:
    """Mean of each object's unit embeddings, of unit norm again: [N / views, D]."""
    return _unit(embeddings_ND.reshape(-1, views, embeddings_ND.shape[-1]).mean(axis=1))


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=-1, keepdims=True), 1e-12)
