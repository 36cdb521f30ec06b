"""From an asset's coloured surface points and posed views to latents (Shap-E §3.1).

Shapes: B assets, N surface points, V views of H x W pixels, S patches of a view, L latent tokens, C latent channels,
D width, M centres of neighbourhoods with K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .decoder import to_z_up
from .linear import Linear
from .patches import ViewPatches
from .points import PointConv
from .transformer import Block, fourier_features

__all__ = ["AssetEncoder", "ViewInputs"]

PointFeatures = Literal["normals", "nerf"]


@dataclass(frozen=True)
class ViewInputs:
    """Posed views of B assets, V each, any V; all in the object frame.

    rgb_BV3HW: sRGB in [0, 1]. seen_BVHW: where the object fills the pixel. origin_BV3: the camera's centre.
    position_BV3HW: the surface point in the pixel; of any value where nothing is seen.
    """

    rgb: torch.Tensor
    seen: torch.Tensor
    origin: torch.Tensor
    position: torch.Tensor


class AssetEncoder(nn.Module):
    """Points, and patches of views, cross-attended into L learned queries, then a transformer.

    Args:
        n_latents, channels: L and C.
        width, heads, layers: of the transformer over the tokens, after the cross-attention.
        point_features: normals: encoded place, normal and colour, through an MLP; nerf: place and colour encoded
            without π (Shap-E), through one linear map, in a frame with z up.
        n_frequencies: of the points' positional encoding.
        n_centres: neighbourhoods of the first so many points that join the queries as tokens (Shap-E: 1,024); points
            should then come in farthest-point order. 0 for none.
        patch_size: of the views, pixels; 0 for an encoder of points alone.
        norm_in: LayerNorm over the tokens before they read (Shap-E).
    """

    def __init__(
        self,
        *,
        n_latents: int,
        channels: int,
        width: int,
        heads: int,
        layers: int,
        n_frequencies: int,
        point_features: PointFeatures = "normals",
        n_centres: int = 0,
        patch_size: int = 0,
        norm_in: bool = False,
    ) -> None:
        super().__init__()
        if n_centres and point_features != "nerf":
            raise ValueError("neighbourhoods (n_centres) need point_features='nerf': one linear map, which is folded")
        self.n_latents, self.n_frequencies, self.point_features = n_latents, n_frequencies, point_features
        self.gradient_checkpointing = False
        if point_features == "normals":
            n_features = 3 * (1 + 2 * n_frequencies) + 6
            self.embed_points = nn.Sequential(nn.Linear(n_features, width), nn.GELU(), nn.Linear(width, width))
        else:
            self.embed_points = nn.Linear(6 * (1 + 2 * n_frequencies), width)
        self.norm_points = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(n_latents, width) / width**0.5)
        self.read_points = Block(width, heads, context_width=width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.project = Linear(width, channels)
        self.norm_in = nn.LayerNorm(width) if norm_in else nn.Identity()
        self.point_conv = PointConv(width, n_centres) if n_centres else None
        self.embed_views = None
        if patch_size:
            self.embed_views = ViewPatches(width, patch_size, n_frequencies)
            self.norm_views = nn.LayerNorm(width)
            self.read_views = Block(width, heads, context_width=width)

    def forward(self, surface_BN9: torch.Tensor | None, views: ViewInputs | None = None) -> torch.Tensor:
        """Either input may be absent.

        Args:
            surface_BN9: xyz (object frame), unit normal, sRGB in [0, 1].
        Returns: unbounded latents [B, L, C].
        Raises: ValueError if both are absent, or there are views and this encoder has no patches.
        """
        if surface_BN9 is None and views is None:
            raise ValueError("there is nothing to encode: give surface points, views, or both")
        if views is not None and self.embed_views is None:
            raise ValueError("this encoder reads surface points alone (its patch_size is 0): leave the views out")
        batch = len(surface_BN9 if surface_BN9 is not None else views.rgb)  # type: ignore[union-attr]
        x_BLD = self.queries.expand(batch, -1, -1)
        features_BNF = self._point_features(surface_BN9) if surface_BN9 is not None else None
        if features_BNF is not None and self.point_conv is not None:
            xyz_BN3 = features_BNF[..., :3]  # the encoding begins with what it encodes
            x_BLD = torch.cat([self.point_conv(xyz_BN3, features_BNF, self.embed_points), x_BLD], dim=1)
        x_BLD = self.norm_in(x_BLD)
        if features_BNF is not None:
            x_BLD = self._run(self.read_points, x_BLD, self.norm_points(self.embed_points(features_BNF)))
        if views is not None:
            x_BLD = self._run(self.read_views, x_BLD, self._view_tokens(views))
        for block in self.blocks:
            x_BLD = self._run(block, x_BLD)
        return self.project(self.norm_out(x_BLD[:, -self.n_latents :]))

    def _run(self, block: Block, *inputs: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _point_features(self, surface_BN9: torch.Tensor) -> torch.Tensor:
        xyz_BN3, normal_BN3, rgb_BN3 = surface_BN9.split(3, dim=-1)
        if self.point_features == "normals":
            return torch.cat([fourier_features(xyz_BN3, self.n_frequencies), normal_BN3, rgb_BN3], dim=-1)
        return fourier_features(torch.cat([to_z_up(xyz_BN3), rgb_BN3], dim=-1), self.n_frequencies, base=1.0)

    def _view_tokens(self, views: ViewInputs) -> torch.Tensor:
        """[B, V·S, D], one view at a time: their encoded pixels are by far the largest thing here."""
        assert self.embed_views is not None
        position_BV3HW = to_z_up(views.position.movedim(2, -1)).movedim(-1, 2)
        origin_BV3 = to_z_up(views.origin)
        kernel = self.embed_views.folded_kernel()
        tokens = []
        for b in range(len(views.rgb)):
            for v in range(views.rgb.shape[1]):
                pixels = (views.rgb[b, v], views.seen[b, v], origin_BV3[b, v], position_BV3HW[b, v])
                tokens.append(self._run_view(kernel, *pixels))
        return self.norm_views(torch.stack(tokens).unflatten(0, views.rgb.shape[:2]).flatten(1, 2))

    def _run_view(self, kernel: tuple[torch.Tensor, torch.Tensor], *pixels: torch.Tensor) -> torch.Tensor:
        assert self.embed_views is not None
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.embed_views, kernel, *pixels, use_reentrant=False)
        return self.embed_views(kernel, *pixels)
