"""The autoencoder: an asset to latents [L, C] that are the parameters of an implicit function, and back."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from .decoder import ImplicitDecoder, ImplicitField
from .encoder import AssetEncoder

__all__ = ["Autoencoder"]


class Autoencoder(ModelMixin, ConfigMixin):
    """Shap-E's encoder and hypernetwork decoder at any size (arXiv 2305.02463, §3.1).

    The latent is bounded by tanh; in training noise is added to it, so that the decoder forgives the
    small errors a denoiser leaves.

    Args:
        n_latents, channels: the latent's shape [L, C].
        width, heads, encoder_layers, decoder_layers: of the transformers on both sides.
        hidden: units of the generated MLP.
        point_frequencies, field_frequencies: positional encoding of encoder and field.
        latent_noise: largest standard deviation of the training noise; each asset's is drawn uniformly below it.
        density_scale: see `ImplicitDecoder`.
    """

    @register_to_config
    def __init__(
        self,
        n_latents: int = 32,
        channels: int = 32,
        width: int = 128,
        heads: int = 4,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        hidden: int = 64,
        point_frequencies: int = 6,
        field_frequencies: int = 6,
        latent_noise: float = 0.1,
        density_scale: float = 0.02,
    ) -> None:
        super().__init__()
        self.encoder = AssetEncoder(
            n_latents=n_latents,
            channels=channels,
            width=width,
            heads=heads,
            layers=encoder_layers,
            n_frequencies=point_frequencies,
        )
        self.decoder = ImplicitDecoder(
            n_latents=n_latents,
            channels=channels,
            width=width,
            heads=heads,
            layers=decoder_layers,
            row_norm=False,
            kind="volsdf",
            hidden=hidden,
            n_frequencies=field_frequencies,
            n_generated=3,
            n_shared=1,
            generated_bias=True,
            density_scale=density_scale,
        )

    def encode(self, surface_BN9: torch.Tensor) -> torch.Tensor:
        """surface_BN9: xyz (object frame), unit normal, sRGB in [0, 1]. Returns latents in (-1, 1), [B, L, C]."""
        return torch.tanh(self.encoder(surface_BN9))

    def decode(self, z_BLC: torch.Tensor) -> ImplicitField:
        """Latents in [-1, 1], [B, L, C], to B implicit functions."""
        return self.decoder(z_BLC)

    def forward(
        self, surface_BN9: torch.Tensor, noise_BLC: torch.Tensor, level_B: torch.Tensor
    ) -> tuple[ImplicitField, torch.Tensor]:
        """Encode, add noise as in training, decode. Returns the field and the latent before its tanh, [B, L, C].

        Args:
            noise_BLC: standard normal.
            level_B: in [0, 1]; times the config's `latent_noise` it is each asset's standard deviation.
        """
        raw_BLC = self.encoder(surface_BN9)
        sigma_B11 = self.config.latent_noise * level_B[:, None, None]
        return self.decode(torch.tanh(raw_BLC) + sigma_B11 * noise_BLC), raw_BLC
