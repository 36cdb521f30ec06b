"""From latents to the weights of an implicit function (Shap-E §3.1, its hypernetwork).

Shapes: B assets, P query points, L latent tokens, C latent channels, D width, K hidden units of the field's MLP,
R rows and I columns of a generated matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .linear import Linear, linear
from .transformer import Block, fourier_features

__all__ = ["FieldValues", "ImplicitDecoder", "ImplicitField", "SurfaceVolume", "to_z_up", "volsdf_density"]

# The last layer gives distances in this unit (object frame): at 1, losses sharp in distance drown those of colour.
SDF_UNIT = 0.1

FieldKind = Literal["volsdf", "nerstf"]


@dataclass(frozen=True)
class FieldValues:
    """What a field is at P points.

    sdf_BP: signed distance, negative inside; in object-frame units, or squashed by tanh (Shap-E).
    density_BP: 1/unit, never negative.
    rgb_BP3: sRGB in [0, 1], of the surface.
    volume_rgb_BP3: sRGB of the volume (NeRF); the surface's where a field has one colour.
    coarse_density_BP, coarse_rgb_BP3: what places the fine samples of a NeRF; the fine ones where a field has no other.
    """

    sdf_BP: torch.Tensor
    density_BP: torch.Tensor
    rgb_BP3: torch.Tensor
    volume_rgb_BP3: torch.Tensor = None  # type: ignore[assignment]
    coarse_density_BP: torch.Tensor = None  # type: ignore[assignment]
    coarse_rgb_BP3: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, fallback in (
            ("volume_rgb_BP3", "rgb_BP3"),
            ("coarse_density_BP", "density_BP"),
            ("coarse_rgb_BP3", "volume_rgb_BP3"),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, fallback))


class ImplicitField:
    """B decoded assets: call it with points, get signed distance, density and colour."""

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


class SurfaceVolume:
    """A field whose density follows from its signed distance: images then give gradients to the mesh head.

    Args:
        beta: width over which the surface fades, in the units of the field's distance; see `volsdf_density`.
    """

    def __init__(self, field: ImplicitField, beta: float) -> None:
        self.field, self.beta = field, beta

    def __len__(self) -> int:
        return len(self.field)

    def __getitem__(self, item: int | slice) -> SurfaceVolume:
        return SurfaceVolume(self.field[item], self.beta)

    @property
    def device(self) -> torch.device:
        return self.field.device

    def __call__(self, points_BP3: torch.Tensor) -> FieldValues:
        values = self.field(points_BP3)
        return FieldValues(values.sdf_BP, volsdf_density(values.sdf_BP, self.beta), values.rgb_BP3)


def volsdf_density(sdf: torch.Tensor, beta: float) -> torch.Tensor:
    """The Laplace distribution's cumulative: density = Ψ(-sdf) / β (VolSDF, arXiv 2106.12052, eq. 2 and 3)."""
    tail = 0.5 * torch.exp(-sdf.abs() / beta)
    return torch.where(sdf > 0, tail, 1 - tail) / beta


def to_z_up(vectors: torch.Tensor) -> torch.Tensor:
    """Our frame (+Y up, front +Z) to Shap-E's (Blender's: +Z up, front -Y); [..., 3]."""
    x, y, z = vectors.unbind(-1)
    return torch.stack([x, -z, y], dim=-1)


class FieldHead(nn.Module):
    """The implicit function's MLP: its first matrices arrive as arguments, the rest is its own.

    Two kinds, by `kind`:
      volsdf: four outputs. Density follows from distance (`volsdf_density`), so mesh and NeRF are one surface.
      nerstf: Shap-E's twelve: distance (tanh; ours is negative inside), coarse and fine density (relu), colours of the
        surface, of the coarse and of the fine volume (sigmoid). Points are encoded without π, in a frame with z up.

    With `generated_bias` the last column of a generated matrix is its bias. (Shap-E's biases are shared by all assets;
    at the tiny size a latent then cannot say "all of it is red", and colours are learned far slower.)

    Args:
        n_generated: matrices made from the latent. n_shared: hidden layers shared by all assets after them.
    """

    def __init__(
        self,
        *,
        kind: FieldKind,
        hidden: int,
        n_frequencies: int,
        n_generated: int,
        n_shared: int,
        generated_bias: bool,
        density_scale: float,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # a ray's many points would otherwise all keep their activations
        self.kind, self.n_frequencies, self.density_scale = kind, n_frequencies, density_scale
        extra = int(generated_bias)
        n_features = 3 * (1 + 2 * n_frequencies)
        self.shapes = [(hidden, n_features + extra)] + [(hidden, hidden + extra)] * (n_generated - 1)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(hidden)) for _ in self.shapes if not generated_bias)
        layers: list[nn.Module] = []
        for _ in range(n_shared):
            layers += [Linear(hidden, hidden), nn.SiLU(inplace=True)]
        self.out = nn.Sequential(*layers, Linear(hidden, 4 if kind == "volsdf" else 12))
        if kind == "nerstf":
            with torch.no_grad():  # a relu that starts at or below zero everywhere would never learn
                self.out[-1].bias[1:3] += 0.1

    def forward(self, points_BP3: torch.Tensor, weights: list[torch.Tensor]) -> FieldValues:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out_BPO = checkpoint(self._evaluate, points_BP3, *weights, use_reentrant=False)
        else:
            out_BPO = self._evaluate(points_BP3, *weights)
        return self._volsdf(out_BPO) if self.kind == "volsdf" else self._nerstf(out_BPO)

    def _evaluate(self, points_BP3: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """The last layer's outputs, before their activations: [B, P, O]."""
        if self.kind == "volsdf":
            h = fourier_features(points_BP3, self.n_frequencies)
        else:
            h = fourier_features(to_z_up(points_BP3), self.n_frequencies, base=1.0)
        alone = len(h) == 1  # one asset: a plain matrix product, which is faster than a batch of one
        h = h[0] if alone else h
        for i, weight_BRI in enumerate(weights):
            bias_BR, weight_BRI = self._bias(i, weight_BRI)
            if alone:
                h = linear(h, weight_BRI[0], bias_BR[0], "silu")
            else:
                h = F.silu(torch.baddbmm(bias_BR[:, None], h, weight_BRI.transpose(1, 2)), inplace=True)
        *hidden, last = [layer for layer in self.out if isinstance(layer, Linear)]
        for layer in hidden:
            h = layer(h, "silu")
        out = last(h)
        return out[None] if alone else out

    def _bias(self, i: int, weight_BRI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A generated layer's bias and its matrix proper."""
        if len(self.biases):
            return self.biases[i][None].expand(len(weight_BRI), -1), weight_BRI
        return weight_BRI[..., -1], weight_BRI[..., :-1]

    def _volsdf(self, out_BP4: torch.Tensor) -> FieldValues:
        sdf_BP = out_BP4[..., 0] * SDF_UNIT
        return FieldValues(sdf_BP, volsdf_density(sdf_BP, self.density_scale), out_BP4[..., 1:].sigmoid())

    def _nerstf(self, out_BPO: torch.Tensor) -> FieldValues:
        coarse_density_BP, density_BP = out_BPO[..., 1:3].relu().unbind(-1)
        colors = out_BPO[..., 3:].sigmoid().unflatten(-1, (3, 3))
        return FieldValues(
            sdf_BP=out_BPO[..., 0].tanh(),
            density_BP=density_BP,
            rgb_BP3=colors[..., 0, :],
            volume_rgb_BP3=colors[..., 2, :],
            coarse_density_BP=coarse_density_BP,
            coarse_rgb_BP3=colors[..., 1, :],
        )


class ImplicitDecoder(nn.Module):
    """Latents → (transformer →) rows of the field's weight matrices.

    Each latent token makes its own share of the rows of the generated matrices, in their order, each row by its own
    linear map. Shap-E gives one row to each of its 1,024 tokens, straight from the latent (`width=None`), and
    normalises a row before its bias is added (`row_norm`); at the tiny size a token owns several.

    Args:
        width, heads, layers: of a transformer over the tokens before they become weights; None, Shap-E's way, has none.
        row_norm: LayerNorm over the columns of a generated row, shared by the rows of a matrix.
        field: the rest is `FieldHead`'s; the rows of all its matrices together must divide by L.
    Raises: ValueError if they do not.
    """

    def __init__(
        self,
        *,
        n_latents: int,
        channels: int,
        width: int | None,
        heads: int,
        layers: int,
        row_norm: bool,
        **field,
    ) -> None:
        super().__init__()
        self.head = FieldHead(**field)
        n_rows = sum(rows for rows, _ in self.head.shapes)
        if n_rows % n_latents:
            raise ValueError(f"the {n_rows} generated rows do not divide among {n_latents} latent tokens")
        self.rows_per_token = n_rows // n_latents
        self.embed = None
        if width is not None:
            self.embed = nn.Linear(channels, width)
            self.positions = nn.Parameter(torch.randn(n_latents, width) / width**0.5)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
        inner = width or channels
        self.rows = nn.ParameterList(
            nn.Parameter(torch.randn(rows, columns, inner) * inner**-0.5) for rows, columns in self.head.shapes
        )
        self.row_biases = nn.ParameterList(
            nn.Parameter(torch.zeros(shape) if row_norm else torch.randn(shape)) for shape in self.head.shapes
        )
        self.row_norms = nn.ModuleList(nn.LayerNorm(columns) for _, columns in self.head.shapes if row_norm)
        for norm in self.row_norms:
            nn.init.constant_(norm.weight, 0.0625)  # 256^-1/2: a row of unit variance keeps its input's scale

    def forward(self, z_BLC: torch.Tensor) -> ImplicitField:
        x_BLD = z_BLC
        if self.embed is not None:
            x_BLD = self.embed(z_BLC) + self.positions
            for block in self.blocks:
                x_BLD = block(x_BLD)
            x_BLD = self.norm(x_BLD)
        x_RBD = x_BLD.repeat_interleave(self.rows_per_token, dim=1).transpose(0, 1)
        weights, start = [], 0
        for i, (row_RID, bias_RI) in enumerate(zip(self.rows, self.row_biases, strict=True)):
            part_RBD = x_RBD[start : start + len(row_RID)]
            matrix_BRI = torch.bmm(part_RBD, row_RID.transpose(1, 2)).transpose(0, 1)
            start += len(row_RID)
            if len(self.row_norms):
                weights.append(self.row_norms[i](matrix_BRI) + bias_RI)
            else:  # He-style scale: the rows enter at unit variance, so each layer keeps its input's
                weights.append((matrix_BRI + bias_RI) / row_RID.shape[1] ** 0.5)
        return ImplicitField(self.head, weights)
