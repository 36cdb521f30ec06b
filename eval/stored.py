"""What the data folder holds of a test object: its exact mesh, its surface points, its pictures. Imports no torch.

Shapes: N points, V views, H height, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data_pipes import grammar
from ..data_pipes.mesh import Mesh
from ..data_pipes.raw_sample import decode_surface, decode_webp
from ..data_pipes.render import composite
from ..data_pipes.scenes import draw_scene
from ..data_pipes.shard_folder import ShardFolder
from ..errors import UserError

__all__ = ["ENCODED_POINTS", "exact_mesh", "frontal_pictures", "surface_rows"]

ENCODED_POINTS = 4096  # as many as training encodes


def exact_mesh(folder: ShardFolder, uid: str, meta: dict[str, Any]) -> Mesh:
    """The mesh of a procedural sample, drawn again from its seed as `procedural.make_sample` drew it."""
    seed, index = uid.removeprefix("p").split("-")
    rng = np.random.Generator(np.random.Philox(key=[int(seed), int(index)]))
    spec = grammar.SceneSpec.from_json(meta["spec"])
    grammar.captions(spec, rng, folder.manifest["settings"]["n_captions"])  # moves the generator as it did then
    return draw_scene(spec, rng).mesh()


def surface_rows(folder: ShardFolder, index: int) -> np.ndarray:
    """The stored surface as the encoder takes it: xyz, unit normal, sRGB in [0, 1]; f32 [N, 9], N at most 4096."""
    what = f"{folder.uids[index]}.surface.npz"
    stored = decode_surface(folder.read(index, ["surface.npz"])["surface.npz"], what)
    stored = {name: array[:ENCODED_POINTS] for name, array in stored.items()}
    normal = stored["normal"].astype(np.float32)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    return np.concatenate([stored["xyz"].astype(np.float32), normal, stored["rgb"].astype(np.float32) / 255], axis=1)


def frontal_pictures(folder: ShardFolder, sample: int | str, first_only: bool = False) -> np.ndarray:
    """The stored lit frontal views of a sample (the first half of all, rounded up) on white: u8 [V, H, W, 3]."""
    names = [name for name in folder.suffixes(sample) if name.startswith("lit_")]
    if not names:
        raise UserError(f"sample {sample} in {folder.folder} has no lit views; build the data with views")
    names = sorted(names)[: 1 if first_only else -(-len(names) // 2)]
    stored = folder.read(sample, names)
    return composite(np.stack([decode_webp(stored[name], f"{sample}.{name}") for name in names]))
