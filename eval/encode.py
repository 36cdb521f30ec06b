"""Test objects through an autoencoder's encoder.

Shapes: K objects, N points, L latents of C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data_pipes.encoder_inputs import farthest_first, view_arrays
from ..data_pipes.loader import RawDataset
from ..data_pipes.shard_folder import ShardFolder
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..models.encoder import ViewInputs
from .stored import surface_rows

__all__ = ["encode_stored", "encode_surfaces"]


@torch.inference_mode()
def encode_stored(autoencoder: Autoencoder, folder: ShardFolder, indices: Sequence[int]) -> torch.Tensor:
    """Latents [K, L, C] of stored samples, without noise, from all that the autoencoder reads of them.

    Raises: UserError for an autoencoder without an encoder.
    """
    config, device = autoencoder.config, autoencoder.device
    if autoencoder.encoder is None:
        raise UserError("this autoencoder came without an encoder (as diffusers' folders do): it cannot encode assets")
    views = None
    if config.patch_size:
        data = RawDataset(folder, split=None, parts=("albedo", "depth", "cameras"), cache_bytes=0)
        arrays = [view_arrays(data[index]) for index in indices]
        names = ViewInputs.__dataclass_fields__
        views = ViewInputs(**{n: torch.from_numpy(np.stack([one[n] for one in arrays])).to(device) for n in names})
    return encode_surfaces(autoencoder, [surface_rows(folder, index) for index in indices], views)


@torch.inference_mode()
def encode_surfaces(
    autoencoder: Autoencoder, surfaces: Sequence[np.ndarray], views: ViewInputs | None = None
) -> torch.Tensor:
    """Latents [K, L, C] without noise.

    Args:
        surfaces: f32 [N, 9] of each object: xyz, unit normal, sRGB in [0, 1]; the fewest points of any are read of all.
    """
    fewest = min(map(len, surfaces))
    rows = [rows_N9[:fewest] for rows_N9 in surfaces]
    if autoencoder.config.n_centres:
        rows = [rows_N9[farthest_first(rows_N9[:, :3], autoencoder.config.n_centres)] for rows_N9 in rows]
    return autoencoder.encode(torch.from_numpy(np.stack(rows)).to(autoencoder.device), views)
