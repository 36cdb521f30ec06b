"""Latent shards: an asset's latent and the features it may be conditioned on, or what they are computed from.

Members of a sample (L latent tokens, C channels, K captions, T text tokens, V views, S image tokens, E, P widths):

    json          uid, captions, split, and the raw sample's category, spec and the like
    latent.npy    f16 [L, C]

and, where the manifest's setting `features` is "cached",

    text.npz      tokens f16 [K, T, E], lengths i16 [K], pooled f16 [K, P]
    image.npz     tokens f16 [V, S, E], pooled f16 [V, P]

K or V is 0 where the conditioner has no tower for text or images. Where the setting is "computed": `lit_00.webp` and so
on, the V pictures as the raw shards have them; the captions are the first `n_captions` of the json.

Beside the shards: `autoencoder/` and `conditioner/`, the models that made them, so that a denoiser trained here leaves
a pipeline that is whole.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import canonical_json
from .raw_sample import ARRAY_ERRORS, decode_json, decode_npz, encode_npz
from .shard_folder import ShardFolder
from .shards import LATENT_FORMAT

__all__ = ["LatentDataset", "LatentSample", "LatentSums", "encode_latent_sample"]

CACHE_BYTES = 2 << 30  # decoded samples that a dataset keeps
PICTURE = "lit_"  # names of pictures begin so, as in raw shards


@dataclass(frozen=True)
class LatentSample:
    """One asset as the denoiser sees it; arrays as in the module's docstring.

    Where features are computed, the arrays of text and image have K and V rows of width 0 until
    `training.features.FeatureSource` fills them; `captions` and `pictures` (WebP) are what they are computed from.
    """

    uid: str
    latent: np.ndarray
    text_tokens: np.ndarray
    text_lengths: np.ndarray
    text_pooled: np.ndarray
    image_tokens: np.ndarray
    image_pooled: np.ndarray
    captions: tuple[str, ...] = ()
    pictures: tuple[bytes, ...] = ()

    @classmethod
    def to_compute(
        cls, uid: str, latent: np.ndarray, captions: tuple[str, ...], pictures: tuple[bytes, ...]
    ) -> LatentSample:
        """A sample without features."""
        k, v = len(captions), len(pictures)
        text = (np.zeros((k, 0, 0)), np.zeros(k, int), np.zeros((k, 0)))
        image = (np.zeros((v, 0, 0)), np.zeros((v, 0)))
        return cls(uid, latent, *text, *image, captions=captions, pictures=pictures)

    @property
    def has_text(self) -> bool:
        return len(self.text_pooled) > 0

    @property
    def has_image(self) -> bool:
        return len(self.image_pooled) > 0

    @property
    def is_computed(self) -> bool:
        """Whether there is something to compute features from; cached ones come without."""
        return bool(self.captions or self.pictures)

    @property
    def nbytes(self) -> int:
        arrays = sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))
        return arrays + sum(map(len, self.captions)) + sum(map(len, self.pictures))


def encode_latent_sample(sample: LatentSample, meta: dict[str, Any]) -> dict[str, bytes]:
    """The members of a latent shard; `meta` has the captions."""
    latent = io.BytesIO()
    np.save(latent, sample.latent.astype(np.float16))
    members = {"json": canonical_json(meta).encode(), "latent.npy": latent.getvalue()}
    if sample.is_computed:
        return members | {f"{PICTURE}{v:02d}.webp": picture for v, picture in enumerate(sample.pictures)}
    text = encode_npz(
        tokens=sample.text_tokens.astype(np.float16),
        lengths=sample.text_lengths.astype(np.int16),
        pooled=sample.text_pooled.astype(np.float16),
    )
    image = encode_npz(tokens=sample.image_tokens.astype(np.float16), pooled=sample.image_pooled.astype(np.float16))
    return members | {"text.npz": text, "image.npz": image}


class LatentDataset:
    """A split of a latent folder, decoded on reading and kept in memory while `cache_bytes` lasts.

    Args:
        folder: of latent shards, or an opened one.
    Raises: UserError if the folder is not one of latents, or is damaged.
    """

    def __init__(
        self, folder: str | Path | ShardFolder, split: str | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.shards = folder if isinstance(folder, ShardFolder) else ShardFolder(folder, LATENT_FORMAT)
        self.indices = self.shards.where(split)
        self._cached_features = self.shards.manifest["settings"].get("features", "cached") == "cached"
        self._n_captions = self.shards.manifest["settings"].get("n_captions", 0)
        self._cache: dict[int, LatentSample] = {}
        self._free = cache_bytes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> LatentSample:
        if i in self._cache:
            return self._cache[i]
        sample = self._read(int(self.indices[i]))
        if sample.nbytes <= self._free:
            self._free -= sample.nbytes
            self._cache[i] = sample
        return sample

    def meta(self, i: int) -> dict[str, Any]:
        """The sample's json."""
        return self.shards.read_json(int(self.indices[i]))

    def _read(self, index: int) -> LatentSample:
        uid = self.shards.uid(index)
        if not self._cached_features:
            names = [name for name in self.shards.suffixes(index) if name.startswith(PICTURE)]
            members = self.shards.read(index, ["json", "latent.npy", *names])
            captions = decode_json(members["json"], f"{uid}.json")["captions"][: self._n_captions]
            pictures = tuple(members[name] for name in names)
            return LatentSample.to_compute(uid, self._latent(uid, members), tuple(captions), pictures)
        members = self.shards.read(index, ["latent.npy", "text.npz", "image.npz"])
        text = decode_npz(members["text.npz"], f"{uid}.text.npz")
        image = decode_npz(members["image.npz"], f"{uid}.image.npz")
        return LatentSample(
            uid=uid,
            latent=self._latent(uid, members),
            text_tokens=text["tokens"],
            text_lengths=text["lengths"],
            text_pooled=text["pooled"],
            image_tokens=image["tokens"],
            image_pooled=image["pooled"],
        )

    def _latent(self, uid: str, members: dict[str, bytes]) -> np.ndarray:
        try:
            return np.load(io.BytesIO(members["latent.npy"]), allow_pickle=False)
        except ARRAY_ERRORS as error:
            raise UserError(f"{self.shards.folder}: {uid}.latent.npy is damaged ({error}); encode again") from None


@dataclass
class LatentSums:
    """Sums of latents and of their squares by channel, without rounding: so their order is nothing to the result.

    A float16 is a whole multiple of 2⁻²⁴, so both are sums of integers, in units of 2⁻²⁴ and 2⁻⁴⁸.

    count: of tokens. total, square: one integer a channel.
    """

    count: int = 0
    total: list[int] = field(default_factory=list)
    square: list[int] = field(default_factory=list)

    def add(self, latent_LC: np.ndarray) -> None:
        """Take in a latent, float16 [L, C], finite, with at most 2²⁰ tokens."""
        units_LC = (latent_LC.astype(np.float64) * 2**24).astype(np.int64)  # 41 bits with the sign
        high_LC, low_LC = units_LC >> 20, units_LC & (2**20 - 1)
        parts = zip(*((a * b).sum(0).tolist() for a, b in ((high_LC,) * 2, (high_LC, low_LC), (low_LC,) * 2)))
        square = [(hh << 40) + (hl << 21) + ll for hh, hl, ll in parts]
        self.merge(LatentSums(len(latent_LC), units_LC.sum(0).tolist(), square))

    def merge(self, other: LatentSums) -> None:
        if not self.count:
            self.total, self.square = [0] * len(other.total), [0] * len(other.square)
        self.count += other.count
        self.total = [a + b for a, b in zip(self.total, other.total)] if other.count else self.total
        self.square = [a + b for a, b in zip(self.square, other.square)] if other.count else self.square

    def mean_std(self) -> tuple[list[float], list[float]]:
        """By channel; a deviation is at least 1e-4. Raises ZeroDivisionError of nothing."""
        n = self.count
        mean = [float(Fraction(total, n * 2**24)) for total in self.total]
        variance = [Fraction(n * s - t * t, (n * 2**24) ** 2) for t, s in zip(self.total, self.square)]
        return mean, [sqrt(max(float(v), 1e-8)) for v in variance]
