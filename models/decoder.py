"""From latents to the weights of an implicit function (Shap-E §3.1, its hypernetwork).

Shapes: B assets, P query points, L latent tokens, C latent channels, D width, K hidden units of the field's MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .transformer import Block, fourier_features

__all__ = ["FieldValues", "ImplicitDecoder", "ImplicitField"]

N_GENERATED = 3  # weight matrices made from the latent; the last two layers are shared by all assets

# The last layer gives distances in this unit (object frame): at 1, losses sharp in distance drown those of colour.
SDF_UNIT = 0.1


@dataclass(frozen=True)
class FieldValues:
    """What a field is at P points.

    sdf_BP: signed distance in object-frame units, negative inside.
    density_BP: 1/unit, never negative.
    rgb_BP3: sRGB in [0, 1].
    """

    sdf_BP: torch.Tensor
    density_BP: torch.Tensor
    rgb_BP3: torch.Tensor


class ImplicitField:
    """B decoded assets: call it with points, get signed distance, density and colour.

    Density follows from distance as the Laplace distribution's cumulative (VolSDF, eq. 2 and 3):
    density = Ψ(-sdf) / β, so that the mesh and the NeRF are one surface.
    """

    def __init__(self, head: FieldHead, weights: list[torch.Tensor]) -> None:
        self.head = head
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights[0])

    def __getitem__(self, item: int | slice) -> ImplicitField:
        """Some of the assets; an int keeps a batch of one."""
        item = slice(item, item + 1) if isinstance(item, int) else item
        return ImplicitField(self.head, [weight[item] for weight in self.weights])

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    def __call__(self, points_BP3: torch.Tensor) -> FieldValues:
        """points_BP3: object frame, [B, P, 3] or [1, P, 3] for the same points in all assets."""
        return self.head(points_BP3.expand(len(self), -1, -1), self.weights)


class FieldHead(nn.Module):
    """The implicit function's MLP: its first matrices arrive as arguments, the rest is its own.

    The last column of a generated matrix is its bias. (Shap-E's biases are shared by all assets; at this size a latent
    then cannot say "all of it is red", and colours are learned far slower.)
    """

    def __init__(self, *, hidden: int, n_frequencies: int, density_scale: float) -> None:
        super().__init__()
        self.n_frequencies = n_frequencies
        self.density_scale = density_scale
        self.shapes = [(hidden, 3 * (1 + 2 * n_frequencies) + 1)] + [(hidden, hidden + 1)] * (N_GENERATED - 1)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 4))

    def forward(self, points_BP3: torch.Tensor, weights: list[torch.Tensor]) -> FieldValues:
        h_BPK = fourier_features(points_BP3, self.n_frequencies)
        for weight_BKI in weights:
            bias_B1K = weight_BKI[:, None, :, -1]
            h_BPK = F.silu(torch.baddbmm(bias_B1K, h_BPK, weight_BKI[..., :-1].transpose(1, 2)))
        sdf_BP, rgb_BP3 = self.out(h_BPK).split([1, 3], dim=-1)
        sdf_BP = sdf_BP.squeeze(-1) * SDF_UNIT
        tail_BP = 0.5 * torch.exp(-sdf_BP.abs() / self.density_scale)
        density_BP = torch.where(sdf_BP > 0, tail_BP, 1 - tail_BP) / self.density_scale
        return FieldValues(sdf_BP, density_BP, rgb_BP3.sigmoid())


class ImplicitDecoder(nn.Module):
    """Latents → transformer → rows of the field's weight matrices.

    Each latent token makes its own share of the rows of every generated matrix, by its own linear map
    (Shap-E's ChannelsParamsProj gives one row to each of its 1,024 tokens; here a token may own several).

    Args:
        hidden: K, units of the field's MLP; 3·K rows must divide by L.
        layers: transformer blocks over the tokens before they become weights (Shap-E: 0).
        density_scale: β of the density, object units: the width over which the surface fades in a NeRF.
    """

    def __init__(
        self,
        *,
        n_latents: int,
        channels: int,
        width: int,
        heads: int,
        layers: int,
        hidden: int,
        n_frequencies: int,
        density_scale: float,
    ) -> None:
        super().__init__()
        self.head = FieldHead(hidden=hidden, n_frequencies=n_frequencies, density_scale=density_scale)
        n_rows = sum(rows for rows, _ in self.head.shapes)
        if n_rows % n_latents:
            raise ValueError(f"{n_rows} generated rows (3 × hidden) do not divide among {n_latents} latent tokens")
        self.embed = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.randn(n_latents, width) / width**0.5)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        columns = max(columns for _, columns in self.head.shapes)
        self.rows = nn.Parameter(torch.randn(n_latents, width, n_rows // n_latents * columns) * width**-0.5)
        self.row_bias = nn.Parameter(torch.randn(n_rows, columns))

    def forward(self, z_BLC: torch.Tensor) -> ImplicitField:
        x_BLD = self.embed(z_BLC) + self.positions
        for block in self.blocks:
            x_BLD = block(x_BLD)
        generated = torch.einsum("bld,ldk->blk", self.norm(x_BLD), self.rows)
        matrices_BRI = generated.reshape(len(z_BLC), *self.row_bias.shape) + self.row_bias
        weights, start = [], 0
        for rows, columns in self.head.shapes:
            # He-style scale: the rows enter at unit variance, so each layer keeps its input's
            weights.append(matrices_BRI[:, start : start + rows, :columns] / columns**0.5)
            start += rows
        return ImplicitField(self.head, weights)
