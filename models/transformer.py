"""Transformer blocks shared by the encoder, the latent decoder and the denoiser.

Shapes: B batch, N query tokens, M context tokens, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Attention", "Block", "fourier_features"]


def fourier_features(x: torch.Tensor, n_frequencies: int, *, base: float = torch.pi / 2) -> torch.Tensor:
    """x and sin/cos(x·2^k·base), k = 0…n-1 (NeRF, eq. 4, with half its base frequency; Shap-E's base is 1).

    At π/2 the slowest wave has period 4, twice the object frame, so that opposite faces of the frame differ.

    Args:
        x: [..., C], the object frame's coordinates in [-1, 1].
    Returns: [..., C·(1 + 2n)].
    """
    scales = base * 2.0 ** torch.arange(n_frequencies, device=x.device, dtype=x.dtype)
    angles = (x[..., None, :] * scales[:, None]).flatten(-2)
    # Shap-E's weights were trained on sin(x + π/2): at its highest frequency cos differs from it by 1e-3 in float32.
    return torch.cat([x, angles.sin(), (angles + torch.pi / 2).sin()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x on itself or on a context, through torch's fused kernel.

    Args:
        context_width: width of the context; None for self-attention.
        qk_norm: RMS-normalise queries and keys per head (ViT-22B, §2): keeps logits bounded at high rates.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self, x_BND: torch.Tensor, context_BMD: torch.Tensor | None = None, mask_BM: torch.Tensor | None = None
    ) -> torch.Tensor:
        """mask_BM: True where a context token may be seen. Returns [B, N, D]."""
        context_BMD = x_BND if context_BMD is None else context_BMD
        q_BHNd = self.norm_q(self.query(x_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        k_BMHd, v_BMHd = self.key_value(context_BMD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        k_BHMd = self.norm_k(k_BMHd.transpose(1, 2))
        mask = None if mask_BM is None else mask_BM[:, None, None, :]
        y_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHMd, v_BMHd.transpose(1, 2), attn_mask=mask)
        return self.out(y_BHNd.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP of four times the width.

    With `modulated`, the two norms take a shift, scale and gate from outside (DiT's adaLN), added to
    learned per-block offsets (PixArt-α's adaLN-single), so that the large projection is shared by all blocks.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        qk_norm: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.attention = Attention(width, heads, context_width=context_width, qk_norm=qk_norm)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if modulated:
            self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x_BND: torch.Tensor,
        context_BMD: torch.Tensor | None = None,
        *,
        mask_BM: torch.Tensor | None = None,
        modulation_B6D: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if modulation_B6D is None:
            x_BND = x_BND + self.attention(self.norm_attention(x_BND), context_BMD, mask_BM)
            return x_BND + self.mlp(self.norm_mlp(x_BND))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation_B6D + self.modulation)[:, :, None].unbind(1)
        h_BND = self.norm_attention(x_BND) * (1 + scale_a) + shift_a
        x_BND = x_BND + gate_a * self.attention(h_BND, context_BMD, mask_BM)
        h_BND = self.norm_mlp(x_BND) * (1 + scale_m) + shift_m
        return x_BND + gate_m * self.mlp(h_BND)
