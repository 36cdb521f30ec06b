"""What the data folder holds of a test object: its exact mesh, its surface points, its pictures.

Shapes: N points, V views, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data_pipes import grammar
from ..data_pipes.encoder_inputs import farthest_first, view_arrays
from ..data_pipes.loader import RawDataset
from ..data_pipes.mesh import Mesh
from ..data_pipes.raw_sample import decode_surface, decode_webp
from ..data_pipes.render import composite
from ..data_pipes.scenes import draw_scene
from ..data_pipes.shards import ShardFolder
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..models.encoder import ViewInputs

__all__ = ["encode_stored", "exact_mesh", "frontal_pictures", "surface_rows"]

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


@torch.inference_mode()
def encode_stored(autoencoder: Autoencoder, folder: ShardFolder, indices: Sequence[int]) -> torch.Tensor:
    """Latents [K, L, C] of stored samples, without noise, from all that the autoencoder reads of them.

    Raises: UserError for an autoencoder without an encoder.
    """
    config, device = autoencoder.config, autoencoder.device
    if autoencoder.encoder is None:
        raise UserError("this autoencoder came without an encoder (as diffusers' folders do): it cannot encode assets")
    rows = [surface_rows(folder, index) for index in indices]
    fewest = min(map(len, rows))
    rows = [rows_N9[:fewest] for rows_N9 in rows]
    if config.n_centres:
        rows = [rows_N9[farthest_first(rows_N9[:, :3], config.n_centres)] for rows_N9 in rows]
    views = None
    if config.patch_size:
        data = RawDataset(folder, split=None, parts=("albedo", "depth", "cameras"), cache_bytes=0)
        arrays = [view_arrays(data[index]) for index in indices]
        names = ViewInputs.__dataclass_fields__
        views = ViewInputs(**{n: torch.from_numpy(np.stack([one[n] for one in arrays])).to(device) for n in names})
    return autoencoder.encode(torch.from_numpy(np.stack(rows)).to(device), views)


def frontal_pictures(folder: ShardFolder, index: int, first_only: bool = False) -> np.ndarray:
    """The stored lit frontal views (the first half of all, rounded up) on white: u8 [V, H, W, 3]."""
    names = [name for name in folder.suffixes(index) if name.startswith("lit_")]
    if not names:
        raise UserError(f"sample {folder.uids[index]} in {folder.folder} has no lit views; build the data with views")
    names = sorted(names)[: 1 if first_only else -(-len(names) // 2)]
    stored = folder.read(index, names)
    return composite(np.stack([decode_webp(stored[name], f"{folder.uids[index]}.{name}") for name in names]))
