"""A CLIP of transformers as the conditioner: what Shap-E's pipelines in diffusers carry, one tower or both.

Shapes as in conditioner.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from ..errors import UserError
from .conditioner import ImageFeatures, LocalTokenizer, TextFeatures, prepare_images
from .hashing import weights_hash

__all__ = ["TransformersConditioner"]


class TransformersConditioner(ModelMixin, ConfigMixin):
    """`Conditioner`'s interface around transformers' towers.

    Shap-E's conventions: text is the projected vector at the end token, of unit norm (the denoiser scales it by
    √width); a picture is the grid of the last block, before any norm or projection.

    Args:
        text_config, vision_config: transformers' configurations as dicts; None for a tower that is not there.
        vision_projection: the image tower ends with CLIP's projection (diffusers' img2img folders have none).
        mean, std: of the pictures' channels.
        tokenizer_json: a `tokenizers` tokenizer; needed with a text tower.
        name: where the weights come from, for the record.
    """

    @register_to_config
    def __init__(
        self,
        text_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        vision_projection: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        tokenizer_json: str | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        if text_config is None and vision_config is None:
            raise ValueError("a conditioner needs a text tower, an image tower, or both")
        self.text = self.vision = None
        if text_config is not None:
            self.text = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(text_config))
            assert tokenizer_json is not None, "a text tower comes with its tokenizer"
            self._tokenize = LocalTokenizer(tokenizer_json, self.text.config.max_position_embeddings)
        if vision_config is not None:
            kind = CLIPVisionModelWithProjection if vision_projection else CLIPVisionModel
            self.vision = kind(CLIPVisionConfig.from_dict(vision_config))
            self.image_size: int = self.vision.config.image_size
        self._weights_hash: str | None = None

    @property
    def weights_hash(self) -> str:
        """Of the towers' tensors; see `weights_hash`."""
        if self._weights_hash is None:
            self._weights_hash = weights_hash(self)
        return self._weights_hash

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Token ids [B, context_length], padded with 0 after the end token; longer texts are cut."""
        return self._tokenize(texts)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> TextFeatures:
        """Text features; T is the longest text of the batch. Raises UserError without a text tower."""
        if self.text is None:
            raise UserError("this conditioner reads pictures alone: give --image instead of --text")
        ids_BT = self.tokenize(texts).to(self.device)
        out = self.text(input_ids=ids_BT)
        lengths_B = ids_BT.argmax(dim=-1) + 1  # the end token has the highest id
        longest = int(lengths_B.max())
        mask_BT = torch.arange(longest, device=ids_BT.device) < lengths_B[:, None]
        return TextFeatures(out.last_hidden_state[:, :longest], mask_BT, F.normalize(out.text_embeds, dim=-1))

    @torch.no_grad()
    def encode_image(self, images: np.ndarray | list[Image.Image]) -> ImageFeatures:
        """As `Conditioner.encode_image`. Raises UserError without an image tower."""
        if self.vision is None:
            raise UserError("this conditioner reads text alone: give --text instead of --image")
        pixels = prepare_images(images, self.image_size, self.config.mean, self.config.std).to(self.device)
        out = self.vision(pixel_values=pixels)
        pooled = out.image_embeds if self.config.vision_projection else out.pooler_output
        return ImageFeatures(out.last_hidden_state[:, 1:], F.normalize(pooled, dim=-1))
