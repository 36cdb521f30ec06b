"""A pipeline's objects as a folder of GLBs, in the layout in which any other system's are scored.

Objects are made in fixed groups, and a rank makes whole groups: what an object is does not depend on how many ranks
there are, or on where a run was stopped. An object without a surface is a GLB without a mesh.

Shapes: B objects of a group, L latents of C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ...checkpoints.meshes import write_empty_glb, write_glb
from ...data_pipes.sampling import sample_surface
from ...errors import UserError
from ...files import sha256_file, sha256_json, write_json
from ...models.autoencoder import Autoencoder
from ...models.mesh import ExtractedMesh, extract_mesh
from ...models.pipeline import ShapeloomPipeline
from ...progress import Bar
from ..encode import encode_stored, encode_surfaces
from ..generate import Request, generate
from ..meshes import is_empty
from ..stored import ENCODED_POINTS
from .prompts import Prompt, PromptSet
from .ranks import Ranks

__all__ = ["Condition", "Sampling", "generate_objects", "open_pipeline", "pipeline_hash", "reconstruct_objects"]

Condition = Literal["text", "image", "both"]
GROUP = 16  # objects made at a time; the last digits of an object depend on it


@dataclass(frozen=True)
class Sampling:
    """How a pipeline makes objects; the fields are those of `ShapeloomPipeline.__call__`."""

    condition: Condition = "text"
    steps: int = 24
    solver: str = "own"
    text_guidance: float = 3.0
    image_guidance: float = 2.0
    resolution: int = 64

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "group": GROUP}


def open_pipeline(pipeline: str | Path, device: str | None) -> ShapeloomPipeline:
    from ...checkpoints.pipeline import load

    pipe = load(pipeline)
    return pipe.to(device) if device else pipe


def pipeline_hash(pipeline: str | Path) -> str:
    """Of every file in the folder.

    Raises: UserError for a folder that is no pipeline.
    """
    folder = Path(pipeline)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"--pipeline {folder} is not a pipeline folder: it has no model_index.json")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sha256_json({str(path.relative_to(folder)): sha256_file(path) for path in files})


def generate_objects(
    opened: Callable[[], ShapeloomPipeline],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    out: Path,
    sampling: Sampling,
    ranks: Ranks,
) -> None:
    """Make `out/ID/SEED.glb` for every prompt and seed; what is there is kept.

    Args:
        opened: gives the pipeline; called only when something is to be made.
    Raises: UserError for prompts without pictures where the condition asks for them.
    """
    if sampling.condition != "text" and (without := next((p for p in prompts if p.image is None), None)):
        raise UserError(f"--condition {sampling.condition} needs a picture for every prompt; '{without.id}' has none")
    settings = {name: getattr(sampling, name) for name in ("steps", "solver", "text_guidance", "image_guidance")}

    def make(batch: Sequence[tuple[Prompt, int]]) -> list[ExtractedMesh]:
        requests = [_request(prompt, seed, sampling.condition) for prompt, seed in batch]
        (latents_BLC,) = generate(opened(), requests, batch_size=GROUP, **settings)
        return _decoded(opened().autoencoder, torch.from_numpy(latents_BLC), sampling.resolution)

    objects = [(prompt, seed) for prompt in prompts for seed in seeds]
    _make_groups(objects, out, make, ranks, "generating")
    if ranks.first:
        write_json(out / "made_by.json", {"sampling": sampling.to_json(), "seeds": list(seeds)})


def reconstruct_objects(
    opened: Callable[[], ShapeloomPipeline],
    prompts: PromptSet,
    chosen: Sequence[Prompt],
    out: Path,
    resolution: int,
    ranks: Ranks,
) -> None:
    """The references through the pipeline's autoencoder: `out/ID/0.glb`; none where it cannot read them."""

    def make(batch: Sequence[tuple[Prompt, int]]) -> Sequence[ExtractedMesh | None]:
        autoencoder = opened().autoencoder
        if prompts.raw is not None:
            z_BLC = encode_stored(autoencoder, prompts.raw, [prompt.index or 0 for prompt, _ in batch])
        else:
            surfaces = [_surface(prompt) for prompt, _ in batch]
            whole = [surface for surface in surfaces if surface is not None]
            made = iter(_decoded(autoencoder, encode_surfaces(autoencoder, whole), resolution)) if whole else iter(())
            return [None if surface is None else next(made) for surface in surfaces]
        return list(_decoded(autoencoder, z_BLC, resolution))

    objects = [(prompt, 0) for prompt in chosen]
    if all(map(Path.exists, _files(objects, out))) or _can_encode(opened().autoencoder, prompts):
        _make_groups(objects, out, make, ranks, "reconstructing")


def _can_encode(autoencoder: Autoencoder, prompts: PromptSet) -> bool:
    """Whether it has an encoder, and one that reads what the references have."""
    return autoencoder.encoder is not None and (prompts.raw is not None or not autoencoder.config.patch_size)


def _make_groups(
    objects: Sequence[tuple[Prompt, int]],
    out: Path,
    make: Callable[[Sequence[tuple[Prompt, int]]], Sequence[ExtractedMesh | None]],
    ranks: Ranks,
    description: str,
) -> None:
    groups = ranks.mine([objects[start : start + GROUP] for start in range(0, len(objects), GROUP)])
    todo = [group for group in groups if not all(map(Path.exists, _files(group, out)))]
    if not todo:
        return
    done = sum(map(len, groups)) - sum(map(len, todo))
    with Bar(sum(map(len, groups)), description, start=done, quiet=not ranks.first) as bar:
        for group in todo:
            for path, mesh in zip(_files(group, out), make(group), strict=True):
                write_empty_glb(path) if mesh is None or is_empty(mesh) else write_glb(path, mesh)
            bar.update(len(group))


def _files(group: Sequence[tuple[Prompt, int]], out: Path) -> list[Path]:
    return [out / prompt.id / f"{seed}.glb" for prompt, seed in group]


def _request(prompt: Prompt, seed: int, condition: Condition) -> Request:
    views: tuple[Image.Image, ...] = ()
    if condition != "text":
        assert prompt.image is not None
        pictures = prompt.image.load().pictures
        assert pictures is not None
        views = (Image.fromarray(pictures["colour"][0]),)
    return Request(seed, None if condition == "image" else prompt.text, views)


def _decoded(autoencoder: Autoencoder, z_BLC: torch.Tensor, resolution: int) -> list[ExtractedMesh]:
    with torch.inference_mode():
        return extract_mesh(autoencoder.decode(z_BLC.to(autoencoder.device)), resolution)


def _surface(prompt: Prompt) -> np.ndarray | None:
    """Points on a reference mesh as the encoder takes them: xyz, unit normal, sRGB in [0, 1]; f32 [N, 9].

    None for a reference that cannot be read: the row of true renders tells it.
    """
    assert prompt.reference is not None
    try:
        mesh = prompt.reference.load().mesh
    except UserError:
        return None
    assert mesh is not None, "only samples of raw shards have no mesh"
    surface = sample_surface(mesh.normalised()[0], ENCODED_POINTS, np.random.default_rng(0))
    return np.concatenate([surface.xyz, surface.normal, surface.rgb.astype(np.float32) / 255], axis=1)
