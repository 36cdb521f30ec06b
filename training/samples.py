"""What the EMA model makes of held-out captions during training: a picture, and R-precision, within bounded time.

The score is for following a run: few objects, two views, a coarse mesh, a small pool of captions. The number to publish
is `shapeloom eval r-precision`'s, with its controls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..checkpoints.clip import load_clip
from ..data_pipes.latents import LatentDataset
from ..models.cameras import orbit
from ..models.conditioner import Conditioner
from ..models.guidance import guided, sample_latents
from ..models.mesh import ExtractedMesh, extract_mesh
from ..models.pipeline import ShapeloomPipeline
from .conditioning import first_conditions
from .features import AnyConditioner, FeatureSource, reads
from .launch import say
from .sheets import picture, pictures, write_sheet

__all__ = ["HeldOutSamples", "open_judge"]

CHUNK = 8  # objects sampled at once: what bounds the memory
RESOLUTION = 32  # points of the meshes' lattice along an edge
POOL = 256  # held-out assets whose captions are in the pool
VIEWS_DEG = (-20.0, 20.0)  # azimuths the judge sees: frontal, so that left stays left


def open_judge(judge: str, conditioner: AnyConditioner) -> Conditioner | None:
    """The CLIP to score with: the folder `judge`, else the conditioner; None, and a word of it, where neither can.

    Raises: UserError if the folder is not of a CLIP.
    """
    if judge:
        return load_clip(judge).eval().requires_grad_(False).to(conditioner.device)
    if isinstance(conditioner, Conditioner) and all(reads(conditioner, kind) for kind in ("text", "image")):
        return conditioner
    say("no R-precision during training: the conditioner has not both towers; judge=FOLDER names a CLIP that has")
    return None


class HeldOutSamples:
    """Samples held-out assets' first captions (or views, for a model that reads no text), always the same, seed 0, 1, …

    Args:
        dataset: latents, of which only the conditions are used.
        source: of their features.
        shown, scored: objects on the sheet, and in R-precision; the sheet's are the first of those.
        steps: of the solver.
        seconds: no further chunk is begun after that.
        judge: None for no score.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        source: FeatureSource,
        *,
        shown: int,
        scored: int,
        steps: int,
        seconds: float,
        judge: Conditioner | None,
    ) -> None:
        self.dataset, self.source, self.judge, self.steps, self.seconds = dataset, source, judge, steps, seconds
        self.shown = min(shown, len(dataset))
        self.count = max(self.shown, min(scored, len(dataset)) if judge is not None else 0)

    @torch.no_grad()
    def __call__(self, pipeline: ShapeloomPipeline, sheet: Path) -> dict[str, float]:
        """Write the sheet; returns `r_precision`, the share of objects whose caption the judge finds first in the pool,
        and `scored`, how many there was time for.
        """
        hits: list[bool] = []
        tiles: list[np.ndarray] = []
        # Sampling must not move the training's random state, or a resumed run would differ.
        with torch.random.fork_rng():
            for first, meshes in self._meshes(pipeline):
                tiles += [picture(mesh) for mesh in meshes[: max(self.shown - first, 0)]]
                if self.judge is not None:
                    hits += self._hits(self.judge, first, meshes)
        if tiles:
            write_sheet(tiles, self.captions[: len(tiles)], sheet)
        return {"r_precision": float(np.mean(hits)), "scored": float(len(hits))} if hits else {}

    def _meshes(self, pipeline: ShapeloomPipeline) -> Iterator[tuple[int, list[ExtractedMesh]]]:
        """Chunks of objects, with the place of the first."""
        denoiser, until = pipeline.denoiser, time.monotonic() + self.seconds
        shape = denoiser.config.n_latents, denoiser.config.channels
        for first in range(0, self.count, CHUNK):
            if time.monotonic() > until:
                return
            places = range(first, min(first + CHUNK, self.count))
            condition = first_conditions(self.source.fill([self.dataset[i] for i in places]), denoiser)
            noise_BLC = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in places])
            predict = guided(denoiser, condition, text_scale=3.0, image_scale=2.0)
            latents_BLC = sample_latents(predict, noise_BLC.to(denoiser.device), pipeline.scheduler, steps=self.steps)
            yield first, extract_mesh(pipeline.decode(denoiser.restore(latents_BLC)), RESOLUTION)

    def _hits(self, judge: Conditioner, first: int, meshes: list[ExtractedMesh]) -> list[bool]:
        """Whether each object's own caption is the likeliest of the pool; an empty object's is not."""
        captions, pool_ND = self._pool
        cameras = orbit(list(VIEWS_DEG), 20, size=judge.image_size)
        views_BVHW3 = np.stack([pictures(mesh, cameras) for mesh in meshes])
        pooled_BVD = judge.encode_image(views_BVHW3.reshape(-1, *views_BVHW3.shape[2:])).pooled.float()
        image_BD = torch.nn.functional.normalize(pooled_BVD, dim=-1).unflatten(0, (len(meshes), -1)).mean(1)
        nearest_B = (image_BD @ pool_ND.T).argmax(-1).tolist()
        own = self.captions[first : first + len(meshes)]
        return [not mesh.empty and captions[n] == caption for mesh, n, caption in zip(meshes, nearest_B, own)]

    @cached_property
    def captions(self) -> list[str]:
        """The first caption of each asset that is sampled."""
        return [self.dataset.meta(i)["captions"][0] for i in range(self.count)]

    @cached_property
    def _pool(self) -> tuple[list[str], torch.Tensor]:
        """Distinct held-out captions, those with parts, colours or shapes exchanged too; unit embeddings [N, D]."""
        assert self.judge is not None
        metas = [self.dataset.meta(i) for i in range(min(POOL, len(self.dataset)))]
        swapped = [swap["caption"] for meta in metas for swap in meta.get("swaps", ())]
        captions = list(dict.fromkeys([meta["captions"][0] for meta in metas] + swapped))
        pooled = [self.judge.encode_text(captions[i : i + 256]).pooled for i in range(0, len(captions), 256)]
        return captions, torch.nn.functional.normalize(torch.cat(pooled).float(), dim=-1)
