"""What `encode` does with assets: which can be used, their latents and features, and how much disk these take.

Shapes: B assets, L latent tokens, C channels, N surface points, V views.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data_pipes.encoder_inputs import surface_features, view_arrays
from ..data_pipes.latents import LatentSample, encode_latent_sample
from ..data_pipes.loader import RawDataset, RawSample
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from .batch import stacked, view_inputs
from .features import AnyConditioner, image_arrays, text_arrays

__all__ = ["Encoder", "Shapes", "common_shapes", "cost"]

Shapes = dict[str, tuple[int, ...]]
LOOKED_AT = 16  # assets that are asked what shape the others have


@dataclass(frozen=True)
class Encoder:
    """Raw samples to latent ones.

    features: "cached" or "computed", as in `EncodeRun`. n_posed_views: that the autoencoder reads.
    n_captions, n_views: to condition on; 0 where the conditioner reads none.
    """

    autoencoder: Autoencoder
    conditioner: AnyConditioner
    features: str
    n_surface: int
    n_posed_views: int
    n_captions: int
    n_views: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Of a raw sample that are read."""
        posed = ("albedo", "depth", "cameras") if self.n_posed_views else ()
        lit = ("lit", "pictures") if self.features == "computed" else ("lit",)  # decoded too, to see that they can be
        return ("surface", *(lit if self.n_views else ()), *posed)

    def shapes(self, sample: RawSample) -> Shapes:
        """Of all that must be alike to be encoded together."""
        shapes: Shapes = {"surface points": sample.stored["surface.xyz"][: self.n_surface].shape}
        if sample.lit is not None:
            shapes["lit views"] = sample.lit[: self.n_views].shape
        if sample.albedo is not None and sample.depth is not None and sample.cameras is not None:
            shapes["unlit views"] = sample.albedo[: self.n_posed_views].shape
            shapes["depth maps"] = sample.depth[: self.n_posed_views].shape
            shapes["cameras"] = (min(len(sample.cameras), self.n_posed_views),)
        return shapes

    def read(self, data: RawDataset, i: int, expected: Shapes | None = None) -> tuple[RawSample | None, str]:
        """A sample, or None and why it cannot be used.

        Raises: OSError where the disk, and not the asset, is at fault.
        """
        try:
            sample = data[i]
            found = self.shapes(sample)
            captions, _ = sample.captions, sample.meta["split"]
        except OSError:
            raise
        except KeyError as error:
            return None, f"its json has no {error}"
        except Exception as error:  # whatever a decoder says of bytes that it does not understand
            return None, str(error) or type(error).__name__
        if self.n_captions and not (captions and all(isinstance(caption, str) for caption in captions)):
            return None, "it has no captions"
        for what, shape in (expected or found).items():
            if found.get(what) != shape:
                return None, f"its {what} are {_by(found.get(what, (0,)))}, those of the other assets {_by(shape)}"
        return sample, ""

    @torch.inference_mode()
    def __call__(self, samples: list[RawSample]) -> list[LatentSample | str]:
        """Latent samples of float16 values, or why an asset has none."""
        if not samples:
            return []
        latents = self.latents(samples).astype(np.float16)
        captions = [sample.captions[: self.n_captions] for sample in samples]
        if self.features == "computed":
            encoded = [
                LatentSample.to_compute(sample.uid, latent, tuple(texts), (sample.pictures or ())[: self.n_views])
                for sample, latent, texts in zip(samples, latents, captions)
            ]
        else:
            texts = text_arrays(captions, self.conditioner)
            images = image_arrays([_views(sample, self.n_views) for sample in samples], self.conditioner)
            encoded = [
                LatentSample(sample.uid, latent, **text, **image)
                for sample, latent, text, image in zip(samples, latents, texts, images)
            ]
        return [sample if np.isfinite(sample.latent).all() else "its latent is not finite" for sample in encoded]

    def latents(self, samples: list[RawSample]) -> np.ndarray:
        """[B, L, C] of surface points and, where the autoencoder reads them, of posed views."""
        n_centres = self.autoencoder.config.n_centres
        points = [surface_features(sample, slice(self.n_surface), n_centres=n_centres) for sample in samples]
        views = {}
        if self.n_posed_views:
            views = stacked([view_arrays(sample, slice(self.n_posed_views)) for sample in samples], "views")
        device = self.autoencoder.device
        seen = view_inputs({name: value.to(device) for name, value in views.items()})
        surface_BN9 = torch.from_numpy(np.stack(points)).to(device)
        return self.autoencoder.encode(surface_BN9, seen).float().cpu().numpy()


def _views(sample: RawSample, count: int) -> list[np.ndarray]:
    return [] if sample.lit is None else list(sample.lit[:count])


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def common_shapes(encoder: Encoder, data: RawDataset) -> Shapes:
    """The shapes that most of the first assets have that can be read; the others' are left out.

    Raises: UserError if none can be read.
    """
    found, first_reason = [], ""
    for i in range(len(data)):
        sample, reason = encoder.read(data, i)
        first_reason = first_reason or reason
        if sample is not None:
            found.append(tuple(encoder.shapes(sample).items()))
        if len(found) == LOOKED_AT:
            break
    if not found:
        raise UserError(f"{data.shards.folder}: not one asset can be encoded, the first because {first_reason}")
    return dict(Counter(found).most_common(1)[0][0])


def cost(encoder: Encoder, data: RawDataset, shapes: Shapes, out: Path) -> str:
    """What the latent folder will take on the disk, from one asset: in words."""
    readable = (encoder.read(data, i, shapes)[0] for i in range(len(data)))
    sample = next(one for one in readable if one is not None)
    encoded = encoder([sample])[0]
    if isinstance(encoded, str):
        return f"encode: {len(data):,} assets"
    members = encode_latent_sample(encoded, sample.meta)
    sizes = {name.split(".")[0].split("_")[0]: 0 for name in members}
    for name, content in members.items():
        sizes[name.split(".")[0].split("_")[0]] += 512 + -(-len(content) // 512) * 512  # as it lies in a tar
    each = sum(sizes.values())
    parts = ", ".join(f"{name.replace('lit', 'pictures')} {_bytes(size)}" for name, size in sizes.items())
    free = shutil.disk_usage(out).free
    text = f"encode: {len(data):,} assets of {_bytes(each)} ({parts}), {_bytes(each * len(data))} in all"
    if each * len(data) > free:
        remedy = "n_views, n_captions" + (" or features=computed" if encoder.features == "cached" else "")
        text += f"; the disk of {out} has {_bytes(free)} free: {remedy} would take less"
    return text


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
