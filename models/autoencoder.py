"""The autoencoder: an asset to latents [L, C] that are the parameters of an implicit function, and back."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from .decoder import FieldKind, ImplicitDecoder, ImplicitField
from .encoder import AssetEncoder, PointFeatures, ViewInputs

__all__ = ["SHAP_E", "Autoencoder", "noised"]

Bottleneck = Literal["additive", "diffusion"]

# The released architecture (its transmitter); `latent_noise` is the share of assets that get noise.
SHAP_E = {
    "n_latents": 1024,
    "channels": 1024,
    "width": 1024,
    "heads": 8,
    "encoder_layers": 11,
    "point_features": "nerf",
    "point_frequencies": 15,
    "n_centres": 1024,
    "patch_size": 8,
    "norm_in": True,
    "bottleneck": "diffusion",
    "latent_noise": 0.1,
    "decoder_width": None,
    "decoder_layers": 0,
    "row_norm": True,
    "field": "nerstf",
    "hidden": 256,
    "field_frequencies": 15,
    "n_generated": 4,
    "n_shared": 2,
    "generated_bias": False,
}


class Autoencoder(ModelMixin, ConfigMixin):
    """Shap-E's encoder and hypernetwork decoder at any size (arXiv 2305.02463, §3.1).

    The latent is bounded by tanh; in training noise is added to it, so that the decoder forgives the
    small errors a denoiser leaves. The defaults are a tiny variant; `SHAP_E` holds the released settings.

    Args:
        n_latents, channels: the latent's shape [L, C].
        width, heads, encoder_layers: of the encoder's transformer.
        point_features, point_frequencies, n_centres, patch_size, norm_in: see `AssetEncoder`.
        with_encoder: False for weights that come without one (diffusers'); such a model only decodes.
        bottleneck, latent_noise: see `noised`.
        decoder_width, decoder_layers, row_norm: see `ImplicitDecoder`; the width None is Shap-E's.
        field, hidden, field_frequencies, n_generated, n_shared, generated_bias, density_scale: see `FieldHead`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        n_latents: int = 32,
        channels: int = 32,
        width: int = 128,
        heads: int = 4,
        encoder_layers: int = 2,
        point_features: PointFeatures = "normals",
        point_frequencies: int = 6,
        n_centres: int = 0,
        patch_size: int = 0,
        norm_in: bool = False,
        with_encoder: bool = True,
        bottleneck: Bottleneck = "additive",
        latent_noise: float = 0.1,
        decoder_width: int | None = 128,
        decoder_layers: int = 2,
        row_norm: bool = False,
        field: FieldKind = "volsdf",
        hidden: int = 64,
        field_frequencies: int = 6,
        n_generated: int = 3,
        n_shared: int = 1,
        generated_bias: bool = True,
        density_scale: float = 0.02,
    ) -> None:
        super().__init__()
        self.encoder = None
        if with_encoder:
            self.encoder = AssetEncoder(
                n_latents=n_latents,
                channels=channels,
                width=width,
                heads=heads,
                layers=encoder_layers,
                n_frequencies=point_frequencies,
                point_features=point_features,
                n_centres=n_centres,
                patch_size=patch_size,
                norm_in=norm_in,
            )
        self.decoder = ImplicitDecoder(
            n_latents=n_latents,
            channels=channels,
            width=decoder_width,
            heads=heads,
            layers=decoder_layers,
            row_norm=row_norm,
            kind=field,
            hidden=hidden,
            n_frequencies=field_frequencies,
            n_generated=n_generated,
            n_shared=n_shared,
            generated_bias=generated_bias,
            density_scale=density_scale,
        )

    def encode(self, surface_BN9: torch.Tensor | None, views: ViewInputs | None = None) -> torch.Tensor:
        """Latents in (-1, 1), [B, L, C], of surface points, posed views, or both.

        Args:
            surface_BN9: xyz (object frame), unit normal, sRGB in [0, 1].
        Raises: ValueError if there is nothing to encode, or this model has no encoder.
        """
        return torch.tanh(self._raw(surface_BN9, views))

    def decode(self, z_BLC: torch.Tensor) -> ImplicitField:
        """Latents in [-1, 1], [B, L, C], to B implicit functions."""
        return self.decoder(z_BLC)

    def forward(
        self,
        surface_BN9: torch.Tensor | None,
        noise_BLC: torch.Tensor,
        level_B: torch.Tensor,
        views: ViewInputs | None = None,
    ) -> tuple[ImplicitField, torch.Tensor]:
        """Encode, add noise as in training, decode. Returns the field and the latent before its tanh, [B, L, C].

        Args:
            noise_BLC: standard normal.
            level_B: uniform in [0, 1); see `noised`.
        """
        raw_BLC = self._raw(surface_BN9, views)
        z_BLC = noised(torch.tanh(raw_BLC), noise_BLC, level_B, self.config.bottleneck, self.config.latent_noise)
        return self.decode(z_BLC), raw_BLC

    def _raw(self, surface_BN9: torch.Tensor | None, views: ViewInputs | None) -> torch.Tensor:
        if self.encoder is None:
            raise ValueError("this autoencoder came without an encoder: it decodes latents and cannot encode assets")
        return self.encoder(surface_BN9, views)


def noised(
    z_BLC: torch.Tensor, noise_BLC: torch.Tensor, level_B: torch.Tensor, bottleneck: Bottleneck, amount: float
) -> torch.Tensor:
    """Latents with the training noise of the bottleneck.

    additive: the deviation is `amount` times the level.
    diffusion: Shap-E's. A share `amount` of the assets is taken to a random step t of 1,024 of a diffusion whose signal
    power is 1 - (t / 1024)^5; the others stay as they are.
    """
    level_B11 = level_B[:, None, None]
    if bottleneck == "additive":
        return z_BLC + amount * level_B11 * noise_BLC
    steps = 1024
    place_B11 = (level_B11 - (1 - amount)) / max(amount, 1e-12)  # the highest levels, spread over [0, 1)
    signal_B11 = 1 - ((torch.floor(place_B11 * steps) + 1) / steps) ** 5
    return torch.where(place_B11 < 0, z_BLC, signal_B11.sqrt() * z_BLC + (1 - signal_B11).sqrt() * noise_BLC)
