"""Latent shards: an asset's latent and the CLIP features it may be conditioned on.

Members of a sample (L latent tokens, C channels, K captions, T text tokens, V views, S image tokens, E, P widths):

    json          uid, captions, split, and the raw sample's category, spec and the like
    latent.npy    f16 [L, C]
    text.npz      tokens f16 [K, T, E], lengths i16 [K], pooled f16 [K, P]
    image.npz     tokens f16 [V, S, E], pooled f16 [V, P]

K or V is 0 where the conditioner has no tower for text or images.

Beside the shards: `autoencoder/` and `conditioner/`, the models that made them, so that a denoiser trained here leaves
a pipeline that is whole.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import canonical_json
from .raw_sample import decode_npz, encode_npz
from .shards import LATENT_FORMAT, ShardFolder

__all__ = ["LatentDataset", "LatentSample", "encode_latent_sample"]


@dataclass(frozen=True)
class LatentSample:
    """One asset as the denoiser sees it; arrays as in the module's docstring."""

    uid: str
    latent: np.ndarray
    text_tokens: np.ndarray
    text_lengths: np.ndarray
    text_pooled: np.ndarray
    image_tokens: np.ndarray
    image_pooled: np.ndarray

    @property
    def has_text(self) -> bool:
        return len(self.text_pooled) > 0

    @property
    def has_image(self) -> bool:
        return len(self.image_pooled) > 0


def encode_latent_sample(sample: LatentSample, meta: dict[str, Any]) -> dict[str, bytes]:
    """The members of a latent shard."""
    latent = io.BytesIO()
    np.save(latent, sample.latent.astype(np.float16))
    return {
        "json": canonical_json(meta).encode(),
        "latent.npy": latent.getvalue(),
        "text.npz": encode_npz(
            tokens=sample.text_tokens.astype(np.float16),
            lengths=sample.text_lengths.astype(np.int16),
            pooled=sample.text_pooled.astype(np.float16),
        ),
        "image.npz": encode_npz(
            tokens=sample.image_tokens.astype(np.float16), pooled=sample.image_pooled.astype(np.float16)
        ),
    }


class LatentDataset:
    """A split of a latent folder, decoded on reading and kept in memory while `cache_bytes` lasts.

    Raises: UserError if the folder is not one of latents, or is damaged.
    """

    def __init__(self, folder: str | Path, split: str | None = None, cache_bytes: int = 2 << 30) -> None:
        self.shards = ShardFolder(folder, LATENT_FORMAT)
        self.indices = [i for i, uid in enumerate(self.shards.uids) if split in (None, self.shards.splits(i))]
        self._cache: dict[int, LatentSample] = {}
        self._free = cache_bytes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> LatentSample:
        if i in self._cache:
            return self._cache[i]
        sample = self._read(self.indices[i])
        size = sum(value.nbytes for value in vars(sample).values() if isinstance(value, np.ndarray))
        if size <= self._free:
            self._free -= size
            self._cache[i] = sample
        return sample

    def meta(self, i: int) -> dict[str, Any]:
        """The sample's json."""
        return self.shards.read_json(self.indices[i])

    def _read(self, index: int) -> LatentSample:
        uid = self.shards.uids[index]
        members = self.shards.read(index, ["latent.npy", "text.npz", "image.npz"])
        try:
            latent = np.load(io.BytesIO(members["latent.npy"]), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{self.shards.folder}: {uid}.latent.npy is damaged ({error}); encode again") from None
        text = decode_npz(members["text.npz"], f"{uid}.text.npz")
        image = decode_npz(members["image.npz"], f"{uid}.image.npz")
        return LatentSample(
            uid=uid,
            latent=latent,
            text_tokens=text["tokens"],
            text_lengths=text["lengths"],
            text_pooled=text["pooled"],
            image_tokens=image["tokens"],
            image_pooled=image["pooled"],
        )
