"""From an asset's coloured surface points to latents (Shap-E §3.1, in its point-cloud half).

Shapes: B assets, N surface points, L latent tokens, C latent channels, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from .transformer import Block, fourier_features

__all__ = ["AssetEncoder"]


class AssetEncoder(nn.Module):
    """Surface points cross-attended into L learned queries, then a transformer.

    Args:
        n_latents, channels: L and C.
        width, heads, layers: of the transformer over the L tokens.
        n_frequencies: of the points' positional encoding.
    """

    def __init__(
        self, *, n_latents: int, channels: int, width: int, heads: int, layers: int, n_frequencies: int
    ) -> None:
        super().__init__()
        self.n_frequencies = n_frequencies
        n_features = 3 * (1 + 2 * n_frequencies) + 6
        self.embed_points = nn.Sequential(nn.Linear(n_features, width), nn.GELU(), nn.Linear(width, width))
        self.norm_points = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(n_latents, width) / width**0.5)
        self.read_points = Block(width, heads, context_width=width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, channels)

    def forward(self, surface_BN9: torch.Tensor) -> torch.Tensor:
        """surface_BN9: xyz (object frame), unit normal, sRGB in [0, 1]. Returns unbounded latents [B, L, C]."""
        xyz_BN3, rest_BN6 = surface_BN9[..., :3], surface_BN9[..., 3:]
        features = torch.cat([fourier_features(xyz_BN3, self.n_frequencies), rest_BN6], dim=-1)
        points_BND = self.norm_points(self.embed_points(features))
        x_BLD = self.read_points(self.queries.expand(len(surface_BN9), -1, -1), points_BND)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.project(self.norm_out(x_BLD))
