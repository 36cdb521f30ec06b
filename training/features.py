"""Text and image features of assets: cached when they are encoded, or computed as batches need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..data_pipes.latents import LatentSample
from ..data_pipes.raw_sample import decode_webp
from ..data_pipes.render import composite
from ..models.conditioner import Conditioner
from ..models.transformers_clip import TransformersConditioner

__all__ = ["AnyConditioner", "FeatureSource", "image_arrays", "reads", "text_arrays"]

AnyConditioner = Conditioner | TransformersConditioner
Chosen = Sequence[int | Sequence[int] | np.ndarray]  # of each sample one caption (or view), or several


def reads(conditioner: AnyConditioner, kind: str) -> bool:
    """Whether it has a tower for "text" or "image"."""
    if not isinstance(conditioner, TransformersConditioner):
        return True
    return (conditioner.text if kind == "text" else conditioner.vision) is not None


def text_arrays(captions: list[list[str]], conditioner: AnyConditioner) -> list[dict[str, Any]]:
    """The text members of each sample; of no captions where none is given."""
    if not any(captions):
        nothing = {"text_tokens": np.zeros((0, 0, 0)), "text_lengths": np.zeros(0), "text_pooled": np.zeros((0, 0))}
        return [nothing] * len(captions)
    text = conditioner.encode_text([caption for row in captions for caption in row])
    arrays = {"text_tokens": text.tokens, "text_lengths": text.mask.sum(-1), "text_pooled": text.pooled}
    return _per_sample(arrays, list(map(len, captions)))


def image_arrays(views: list[list[np.ndarray]], conditioner: AnyConditioner) -> list[dict[str, Any]]:
    """The image members of each sample, from u8 [H, W, 4] views; of none where none is given."""
    if not any(map(len, views)):
        return [{"image_tokens": np.zeros((0, 0, 0)), "image_pooled": np.zeros((0, 0))}] * len(views)
    image = conditioner.encode_image(np.stack([composite(view) for of_sample in views for view in of_sample]))
    return _per_sample({"image_tokens": image.tokens, "image_pooled": image.pooled}, list(map(len, views)))


class FeatureSource:
    """Fills samples whose features are not cached, by the conditioner of their folder; others it hands back.

    Args:
        conditioner: moved to `device`, and left in evaluation mode.
        device: None leaves it where it is.
    """

    def __init__(self, conditioner: AnyConditioner, device: torch.device | None = None) -> None:
        self.conditioner = conditioner.eval().requires_grad_(False)
        if device is not None:
            self.conditioner.to(device)

    def fill(
        self, samples: Sequence[LatentSample], texts: Chosen | None = None, images: Chosen | None = None
    ) -> list[LatentSample]:
        """The samples with the features of the chosen captions and views, at the places they have among all.

        Only these are computed, the rest is zeros; rounded to float16, as cached ones are.

        Args:
            texts, images: one, or several, of each sample; None is the first.
        """
        samples = list(samples)
        if not samples or not samples[0].is_computed:
            return samples
        firsts = [0] * len(samples)
        if samples[0].has_text:
            samples = self._fill_text(samples, _rows(firsts if texts is None else texts))
        if samples[0].has_image:
            samples = self._fill_images(samples, _rows(firsts if images is None else images))
        return samples

    def _fill_text(self, samples: list[LatentSample], chosen: list[list[int]]) -> list[LatentSample]:
        arrays = text_arrays([[s.captions[k] for k in ks] for s, ks in zip(samples, chosen)], self.conditioner)
        return [
            replace(sample, **_spread(of_sample, ks, len(sample.captions)))
            for sample, ks, of_sample in zip(samples, chosen, arrays)
        ]

    def _fill_images(self, samples: list[LatentSample], chosen: list[list[int]]) -> list[LatentSample]:
        pictures = [
            [decode_webp(sample.pictures[v], f"picture {v} of {sample.uid}") for v in vs]
            for sample, vs in zip(samples, chosen)
        ]
        return [
            replace(sample, **_spread(of_sample, vs, len(sample.pictures)))
            for sample, vs, of_sample in zip(samples, chosen, image_arrays(pictures, self.conditioner))
        ]


def _rows(chosen: Chosen) -> list[list[int]]:
    return [np.atleast_1d(np.asarray(of_sample, int)).tolist() for of_sample in chosen]


def _spread(arrays: dict[str, np.ndarray], places: list[int], count: int) -> dict[str, Any]:
    """Rows of the arrays put at `places` of `count`, the others zeros."""
    wide = {}
    for name, array in arrays.items():
        wide[name] = np.zeros((count, *array.shape[1:]), np.float16 if array.dtype.kind == "f" else array.dtype)
        wide[name][places] = array
    return wide


def _per_sample(arrays: dict[str, torch.Tensor], counts: list[int]) -> list[dict[str, Any]]:
    """Arrays over all captions (or views) cut into each sample's."""
    parts = {name: array.cpu().split(counts) for name, array in arrays.items()}
    return [{name: part[i].numpy() for name, part in parts.items()} for i in range(len(counts))]
