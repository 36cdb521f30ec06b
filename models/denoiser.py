"""The latent diffusion transformer (Shap-E §3.2; DiT), under text and image conditioning.

Shapes: B batch, L latent tokens, C latent channels, D width, T text tokens, S image tokens, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .transformer import Block

__all__ = ["Condition", "Denoiser", "timestep_embedding"]


@dataclass(frozen=True)
class Condition:
    """What B samples are conditioned on. `has_text_B`, `has_image_B` say for which samples it counts.

    text_tokens_BTE, text_mask_BT (True at words), text_pooled_BP: of the CLIP text tower.
    image_tokens_BSE, image_pooled_BP: of the image tower.
    """

    text_tokens: torch.Tensor
    text_mask: torch.Tensor
    text_pooled: torch.Tensor
    has_text: torch.Tensor
    image_tokens: torch.Tensor
    image_pooled: torch.Tensor
    has_image: torch.Tensor

    def keep(self, *, text: bool, image: bool) -> Condition:
        """The same condition with its text or image taken away."""
        return replace(
            self,
            has_text=self.has_text if text else torch.zeros_like(self.has_text),
            has_image=self.has_image if image else torch.zeros_like(self.has_image),
        )

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        names = Condition.__dataclass_fields__
        return Condition(**{name: torch.cat([getattr(c, name) for c in conditions]) for name in names})


def timestep_embedding(t_B: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of 1000·t, cosines first, as Shap-E's; t in [0, 1]. Returns [B, width]."""
    half = width // 2
    frequencies = torch.exp(-torch.arange(half, device=t_B.device) / half * torch.log(torch.tensor(10_000.0)))
    angles_BH = 1000 * t_B[:, None] * frequencies
    return torch.cat([angles_BH.cos(), angles_BH.sin()], dim=-1)


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts the flow velocity of noisy latents.

    The noise level and the conditioning tokens stand as a prefix before the latent tokens, as in Shap-E;
    text and image have each their own projection and their own learned null. With `adaln`, noise level and
    pooled embeddings also modulate every block.

    Args:
        n_latents, channels: L, C.
        patch: neighbouring latent tokens packed into one transformer token.
        width, heads, layers: of the transformer.
        text_width, image_width, pooled_width: of the conditioner's text tokens, image tokens, pooled embeddings.
        max_text_tokens: longest text; its tokens are told their places again, as a small CLIP's last layer blurs them.
        latent_mean, latent_std: [C], of the training latents; sampling undoes the standardisation with them.
        autoencoder_hash: of the autoencoder whose latents these are; loading refuses another.
        conditioner_hash: of the CLIP whose features these were trained on.
    """

    @register_to_config
    def __init__(
        self,
        n_latents: int = 32,
        channels: int = 32,
        patch: int = 2,
        width: int = 192,
        heads: int = 6,
        layers: int = 6,
        text_width: int = 128,
        image_width: int = 512,
        pooled_width: int = 128,
        max_text_tokens: int = 77,
        qk_norm: bool = True,
        adaln: bool = True,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
        autoencoder_hash: str = "",
        conditioner_hash: str = "",
    ) -> None:
        super().__init__()
        if n_latents % patch:
            raise ValueError(f"patch {patch} does not divide the {n_latents} latent tokens")
        n_tokens, token_width = n_latents // patch, channels * patch
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.text_tokens = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.text_positions = nn.Parameter(torch.randn(max_text_tokens, width) / width**0.5)
        self.text_pooled = nn.Linear(pooled_width, width)
        self.text_null = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.image_tokens = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, width))
        self.image_pooled = nn.Linear(pooled_width, width)
        self.image_null = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.kinds = nn.Parameter(torch.randn(5, width) / width**0.5)
        self.latent_in = nn.Linear(token_width, width)
        self.positions = nn.Parameter(torch.randn(n_tokens, width) / width**0.5)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) if adaln else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm=qk_norm, modulated=adaln) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.latent_out = nn.Linear(width, token_width)
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    def restore(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Standardised latents to the autoencoder's, clamped to its (-1, 1)."""
        if self.config.latent_mean is None:
            return x_BLC.clamp(-1, 1)
        mean_C, std_C = x_BLC.new_tensor(self.config.latent_mean), x_BLC.new_tensor(self.config.latent_std)
        return (x_BLC * std_C + mean_C).clamp(-1, 1)

    def forward(self, x_BLC: torch.Tensor, t_B: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Velocity noise - data of the path x_t = (1 - t)·data + t·noise.

        Args:
            x_BLC: noisy standardised latents.
            t_B: noise level in [0, 1].
        Returns: [B, L, C].
        """
        time_BD = self.time(timestep_embedding(t_B, self.config.width).to(x_BLC.dtype))
        prefix_BMD, mask_BM, pooled_BD = self._prefix(condition)
        latents_BND = self.latent_in(x_BLC.unflatten(1, (-1, self.config.patch)).flatten(2)) + self.positions
        h_BND = torch.cat([(time_BD + self.kinds[4])[:, None], prefix_BMD, latents_BND], dim=1)
        mask_BN = nn.functional.pad(mask_BM, (1, latents_BND.shape[1]), value=True)
        modulation = None
        if self.modulation is not None:
            modulation = self.modulation(time_BD + pooled_BD).unflatten(-1, (6, -1))
        for block in self.blocks:
            h_BND = block(h_BND, mask_BM=mask_BN, modulation_B6D=modulation)
        y_BND = self.latent_out(self.norm_out(h_BND[:, -latents_BND.shape[1] :]))
        return y_BND.unflatten(-1, (self.config.patch, -1)).flatten(1, 2)

    def _prefix(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Conditioning tokens [B, M, D], their mask, and the sum of the pooled embeddings [B, D].

        A sample without text (or image) shows one null token in its place; the others are masked away.
        """
        has_text, has_image = condition.has_text[:, None, None], condition.has_image[:, None, None]
        scale = condition.text_pooled.shape[-1] ** 0.5  # unit vectors to unit variance, as Shap-E scales CLIP's
        n_words = condition.text_tokens.shape[1]
        text = self.text_tokens(condition.text_tokens) + self.text_positions[:n_words] + self.kinds[0]
        text = torch.where(has_text, text, self.text_null[0])
        text_pooled = torch.where(has_text, self.text_pooled(condition.text_pooled * scale)[:, None], self.text_null[1])
        image = self.image_tokens(condition.image_tokens) + self.kinds[2]
        image = torch.where(has_image, image, self.image_null[0])
        image_pooled = torch.where(
            has_image, self.image_pooled(condition.image_pooled * scale)[:, None], self.image_null[1]
        )
        tokens = torch.cat([text_pooled + self.kinds[1], image_pooled + self.kinds[3], text, image], dim=1)
        always = torch.ones_like(condition.has_text)[:, None].expand(-1, 2)
        shown_text = condition.text_mask & condition.has_text[:, None]
        shown_image = condition.has_image[:, None].expand(-1, image.shape[1])
        return tokens, torch.cat([always, shown_text, shown_image], dim=1), (text_pooled + image_pooled)[:, 0]
