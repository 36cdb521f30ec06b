"""The frozen CLIP towers that condition the denoiser (or judge its results).

Shapes: B batch, T text tokens, S image tokens, E token width, P pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from open_clip.model import CLIP
from PIL import Image
from tokenizers import Tokenizer

from .hashing import weights_hash

__all__ = ["Conditioner", "ImageFeatures", "LocalTokenizer", "TextFeatures", "prepare_images"]


@dataclass(frozen=True)
class TextFeatures:
    """tokens_BTE after the final norm, mask_BT True at words, pooled_BP of unit norm."""

    tokens: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """tokens_BSE of the last block's grid (row by row), pooled_BP of unit norm.

    Of several views: [B, V, S, E] and [B, V, P], and views_BV, True at those there are.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor
    views: torch.Tensor | None = None


class Conditioner(ModelMixin, ConfigMixin):
    """An open_clip model with its tokenizer and picture preparation, all from one config.

    Args:
        model_cfg: open_clip's `model_cfg` (embed_dim, vision_cfg, text_cfg).
        mean, std: of the pictures' channels, as the model was trained.
        tokenizer_json: a `tokenizers` tokenizer, or None for open_clip's own BPE.
        name: where the weights come from, for the record.
    """

    @register_to_config
    def __init__(
        self,
        model_cfg: dict[str, Any],
        mean: list[float] | None = None,
        std: list[float] | None = None,
        tokenizer_json: str | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.clip = CLIP(**{**model_cfg, "output_dict": True})
        self.context_length: int = model_cfg["text_cfg"].get("context_length", 77)
        size = model_cfg["vision_cfg"].get("image_size", 224)
        self.image_size: int = size if isinstance(size, int) else size[0]
        if tokenizer_json is None:
            from open_clip.tokenizer import SimpleTokenizer

            self._tokenize = SimpleTokenizer(context_length=self.context_length)
        else:
            self._tokenize = LocalTokenizer(tokenizer_json, self.context_length)
        self._weights_hash: str | None = None

    @property
    def weights_hash(self) -> str:
        """Of the towers' tensors; see `weights_hash`."""
        if self._weights_hash is None:
            self._weights_hash = weights_hash(self.clip)
        return self._weights_hash

    def forward(self, pixels_B3HW: torch.Tensor, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prepared pictures and token ids to unit `image_features`, `text_features` and `logit_scale`, for training."""
        return self.clip(pixels_B3HW, ids_BT)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Token ids [B, context_length], padded with 0 after the end token; longer texts are cut."""
        return self._tokenize(texts)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> TextFeatures:
        """Text features; T is the longest text of the batch."""
        return self.encode_tokens(self.tokenize(texts).to(self.device))

    @torch.no_grad()
    def encode_tokens(self, ids_BT: torch.Tensor) -> TextFeatures:
        """As `encode_text`, from token ids."""
        out = self.clip.forward_intermediates(text=ids_BT, text_indices=1, normalize_intermediates=True)
        # The end token may share id 0 with padding in no tokenizer we read; all up to it counts.
        lengths_B = ids_BT.argmax(dim=-1) + 1
        longest = int(lengths_B.max())
        mask_BT = torch.arange(longest, device=ids_BT.device) < lengths_B[:, None]
        return TextFeatures(out["text_intermediates"][-1][:, :longest], mask_BT, out["text_features"])

    @torch.no_grad()
    def encode_image(self, images: np.ndarray | list[Image.Image]) -> ImageFeatures:
        """images: uint8 [B, H, W, 3] sRGB, or PIL pictures (transparency is put on white)."""
        out = self.clip.forward_intermediates(image=self.prepare(images).to(self.device), image_indices=1)
        tokens_BSE = out["image_intermediates"][-1].flatten(2).transpose(1, 2)
        return ImageFeatures(tokens_BSE, out["image_features"])

    def prepare(self, images: np.ndarray | list[Image.Image]) -> torch.Tensor:
        """Pictures as the image tower wants them: padded to a square, resized, normalised; [B, 3, H, W]."""
        return prepare_images(images, self.image_size, self.config.mean, self.config.std)


def prepare_images(
    images: np.ndarray | list[Image.Image], size: int, mean: list[float] | None, std: list[float] | None
) -> torch.Tensor:
    """Pictures padded to a square, resized, normalised: [B, 3, size, size]. See `Conditioner.encode_image`."""
    if isinstance(images, list):
        images = np.stack([_square(image, size) for image in images])
    elif images.shape[1:3] != (size, size):
        images = np.stack([_square(Image.fromarray(image), size) for image in images])
    pixels = torch.from_numpy(images).float().div(255).permute(0, 3, 1, 2)
    mean_311 = pixels.new_tensor(mean or [0.5] * 3)[:, None, None]
    std_311 = pixels.new_tensor(std or [0.5] * 3)[:, None, None]
    return (pixels - mean_311) / std_311


class LocalTokenizer:
    """A `tokenizers` tokenizer from its JSON, giving fixed-length ids as open_clip's tokenizers do."""

    def __init__(self, tokenizer_json: str, context_length: int) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        ids_BT = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, encoding in zip(ids_BT, self.tokenizer.encode_batch(texts), strict=True):
            ids = encoding.ids
            # A text that is too long loses words, never its end token: pooling reads there.
            ids = ids if len(ids) <= len(row) else [*ids[: len(row) - 1], ids[-1]]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BT


def _square(image: Image.Image, size: int) -> np.ndarray:
    """On white, padded to a square, resized; uint8 [size, size, 3]."""
    rgba = image.convert("RGBA")
    side = max(rgba.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
