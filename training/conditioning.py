"""Which conditions a sample sees in training, and what of them: a caption, some views, or nothing (for guidance).

Shapes: B batch, T text tokens, V views, S image tokens of a view.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ..config import Config
from ..data_pipes.latents import LatentSample
from ..errors import UserError
from ..models.denoiser import Condition, Denoiser

__all__ = [
    "ConditioningConfig",
    "choose_views",
    "conditions_seen",
    "first_conditions",
    "image_features",
    "text_features",
]

SHARES = {"text": 0.6, "image": 0.2, "both": 0.1, "nothing": 0.1}


class ConditioningConfig(Config):
    """Shares of samples that see text alone, image alone, both, or nothing (for guidance); they add to 1.

    Or, instead, chances of dropping: text and image each by itself (drop_text, drop_image), and both at once
    (drop_both), which follow the shares both = (1 - p_b)(1 - p_t)(1 - p_i), text = (1 - p_b)(1 - p_t)·p_i, and so on.

    A model that reads text alone, or images alone, sees that in all samples but the share `nothing`.
    """

    text: float = Field(default=SHARES["text"], ge=0)
    image: float = Field(default=SHARES["image"], ge=0)
    both: float = Field(default=SHARES["both"], ge=0)
    nothing: float = Field(default=SHARES["nothing"], ge=0)
    drop_text: float | None = Field(default=None, ge=0, le=1)
    drop_image: float | None = Field(default=None, ge=0, le=1)
    drop_both: float | None = Field(default=None, ge=0, le=1)

    def shares(self) -> dict[str, float]:
        """The four shares. Raises UserError if they do not add to 1, or chances are given beside them."""
        shares = {name: getattr(self, name) for name in SHARES}
        drops = (self.drop_text, self.drop_image, self.drop_both)
        if any(drop is not None for drop in drops):
            if shares != SHARES:
                raise UserError(
                    "conditioning: give the shares text, image, both, nothing, or the chances drop_text, drop_image, "
                    "drop_both, not some of each"
                )
            text, image, both = (1 - (drop or 0.0) for drop in drops)  # chances to stay
            return {
                "text": both * text * (1 - image),
                "image": both * (1 - text) * image,
                "both": both * text * image,
                "nothing": 1 - both + both * (1 - text) * (1 - image),
            }
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"conditioning: the four shares must add to 1, they are {list(shares.values())}")
        return shares


def conditions_seen(seed: int, uid: str, epoch: int, shares: dict[str, float]) -> tuple[bool, bool]:
    """Whether an asset shows its text, and its image, in an epoch: a function of (seed, uid, epoch) and nothing else.

    So neither batch size, ranks, order, a restart nor further assets in the data change it. Over many assets or epochs
    the shares are as given.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{uid}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest, "big") / 2**64
    edges = np.cumsum(list(shares.values()))
    mode = list(shares)[int(np.searchsorted(edges, drawn * edges[-1], side="right"))]
    return mode in ("text", "both"), mode in ("image", "both")


def choose_views(rng: np.random.Generator, there: int, max_views: int) -> np.ndarray:
    """Between 1 and `max_views` different ones of `there` views, each count as likely, in random order."""
    if max_views == 1 or there < 2:
        return rng.integers(max(there, 1), size=1)
    return rng.permutation(there)[: rng.integers(1, min(max_views, there) + 1)]


def text_features(samples: list[LatentSample], chosen: list[int], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """A caption of each, padded to the longest of them; one masked token of zeros where none are stored."""
    count = len(samples)
    if not samples[0].has_text:
        return {
            "text_tokens": np.zeros((count, 1, settings["text_width"]), np.float32),
            "text_mask": np.zeros((count, 1), bool),
            "text_pooled": np.zeros((count, settings["pooled_width"]), np.float32),
        }
    lengths_B = np.array([sample.text_lengths[k] for sample, k in zip(samples, chosen, strict=True)])
    tokens_BTE = np.zeros((count, int(lengths_B.max()), samples[0].text_tokens.shape[-1]), np.float32)
    for row, length, sample, k in zip(tokens_BTE, lengths_B, samples, chosen, strict=True):
        row[:length] = sample.text_tokens[k, :length]
    return {
        "text_tokens": tokens_BTE,
        "text_mask": np.arange(tokens_BTE.shape[1]) < lengths_B[:, None],
        "text_pooled": np.stack([s.text_pooled[k] for s, k in zip(samples, chosen, strict=True)]).astype(np.float32),
    }


def image_features(
    samples: list[LatentSample], chosen: list[np.ndarray], settings: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The chosen views of each, padded to the most of them; one token of zeros where none are stored.

    Where no sample has more than one view, there is no axis of views.
    """
    if not samples[0].has_image:
        return {
            "image_tokens": np.zeros((len(samples), 1, settings["image_width"]), np.float32),
            "image_pooled": np.zeros((len(samples), settings["pooled_width"]), np.float32),
        }
    most = max(len(views) for views in chosen)
    if most == 1:
        return {
            name: np.stack([getattr(s, name)[v[0]] for s, v in zip(samples, chosen, strict=True)]).astype(np.float32)
            for name in ("image_tokens", "image_pooled")
        }
    arrays: dict[str, np.ndarray] = {}
    for name in ("image_tokens", "image_pooled"):
        arrays[name] = np.zeros((len(samples), most, *getattr(samples[0], name).shape[1:]), np.float32)
        for row, sample, views in zip(arrays[name], samples, chosen, strict=True):
            row[: len(views)] = getattr(sample, name)[views]
    return arrays | {"views": np.arange(most) < np.array([len(views) for views in chosen])[:, None]}


def first_conditions(samples: list[LatentSample], model: Denoiser) -> Condition:
    """The first caption of each, or the first view for a model that reads no text, on the model's device."""
    by_text, first = model.takes("text"), np.zeros(1, int)
    arrays = text_features(samples, [0] * len(samples), model.config)
    arrays |= image_features(samples, [first] * len(samples), model.config)
    arrays |= {"has_text": np.full(len(samples), by_text), "has_image": np.full(len(samples), not by_text)}
    return Condition(**{name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()})
