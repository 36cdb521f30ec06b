"""Transformer blocks shared by the encoder, the latent decoder and the denoiser.

Shapes: B batch, N query tokens, M context tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from .linear import Linear

__all__ = ["Attention", "AttentionBackend", "Block", "attend", "fourier_features", "set_attention"]

AttentionBackend = Literal["auto", "sdpa", "xformers"]


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


def attend(
    q_BNHd: torch.Tensor,
    k_BMHd: torch.Tensor,
    v_BMHd: torch.Tensor,
    mask_BM: torch.Tensor | None = None,
    backend: AttentionBackend = "sdpa",
) -> torch.Tensor:
    """softmax(q·kᵀ / √d)·v per head, by torch's fused kernels (sdpa) or xformers' memory-efficient ones.

    Args:
        mask_BM: True where a context token may be seen; every query must see one.
    Returns: [B, N, H, d].
    Raises: UserError if xformers is asked for and cannot be imported, or has no kernel for device, type or shape.
    """
    if backend != "xformers":
        mask = None if mask_BM is None else mask_BM[:, None, None, :]
        q_BHNd, k_BHMd, v_BHMd = (x.transpose(1, 2) for x in (q_BNHd, k_BMHd, v_BMHd))
        return F.scaled_dot_product_attention(q_BHNd, k_BHMd, v_BHMd, attn_mask=mask).transpose(1, 2)
    # It takes one type for all three, where autocast leaves the normalised queries and keys in float32.
    q_BNHd, k_BMHd = q_BNHd.to(v_BMHd.dtype), k_BMHd.to(v_BMHd.dtype)
    try:
        return _xformers_kernel()(q_BNHd, k_BMHd, v_BMHd, attn_bias=_bias(mask_BM, q_BNHd))
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"attention=xformers: it has no kernel for {str(q_BNHd.dtype).removeprefix('torch.')} on "
            f"{q_BNHd.device.type} ({_first_line(error)}); set attention=sdpa"
        ) from None


def _xformers_kernel():
    """xformers' attention of [B, tokens, heads, d] tensors. Raises UserError where it cannot be imported."""
    try:
        from xformers.ops import memory_efficient_attention
    except Exception as error:  # a build for another torch fails in ways of its own
        raise UserError(
            f"attention=xformers: the package cannot be imported ({_first_line(error)}); "
            "pip install 'shapeloom[xformers]' on a machine with CUDA, or set attention=sdpa"
        ) from None
    return memory_efficient_attention


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":")


def _bias(mask_BM: torch.Tensor | None, q_BNHd: torch.Tensor) -> torch.Tensor | None:
    """0 where a token may be seen, -inf elsewhere, [B, H, N, M]; its rows begin at multiples of 8, as xformers asks."""
    if mask_BM is None:
        return None
    count = mask_BM.shape[1]
    padded_BM = F.pad(torch.zeros_like(mask_BM, dtype=q_BNHd.dtype).masked_fill(~mask_BM, -torch.inf), (0, -count % 8))
    return padded_BM[:, None, None, :].expand(-1, q_BNHd.shape[2], q_BNHd.shape[1], -1)[..., :count]


def set_attention(model: nn.Module, backend: AttentionBackend, device: torch.device | str = "cpu") -> AttentionBackend:
    """Have every attention of a model done by a backend; the weights are none of its business.

    auto is xformers where it is installed and has kernels for `device`, else sdpa.

    Args:
        device: where the model will run; xformers is tried there, in the types of training.
    Returns: the backend chosen.
    Raises: UserError if xformers is asked for and cannot do it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    if backend != "sdpa" and layers:
        width = layers[0].query.out_features // layers[0].heads
        probe = torch.zeros(1, 8, 1, width, device=device)
        try:
            attend(probe, probe, probe, torch.ones(1, 8, dtype=torch.bool, device=device), "xformers")
            backend = "xformers"
        except UserError:
            if backend == "xformers":
                raise
            backend = "sdpa"
    for layer in layers:
        layer.backend = backend
    return backend


class Attention(nn.Module):
    """Multi-head attention of x on itself or on a context; `set_attention` chooses the kernels.

    Args:
        context_width: width of the context; None for self-attention.
        qk_norm: RMS-normalise queries and keys per head (ViT-22B, §2): keeps logits bounded at high rates.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.backend: AttentionBackend = "sdpa"
        self.query = Linear(width, width)
        self.key_value = Linear(context_width or width, 2 * width)
        self.out = Linear(width, width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self, x_BND: torch.Tensor, context_BMD: torch.Tensor | None = None, mask_BM: torch.Tensor | None = None
    ) -> torch.Tensor:
        """mask_BM: True where a context token may be seen. Returns [B, N, D]."""
        context_BMD = x_BND if context_BMD is None else context_BMD
        q_BNHd = self.norm_q(self.query(x_BND).unflatten(-1, (self.heads, -1)))
        k_BMHd, v_BMHd = self.key_value(context_BMD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        y_BNHd = attend(q_BNHd, self.norm_k(k_BMHd), v_BMHd, mask_BM, self.backend)
        return self.out(y_BNHd.flatten(2))


class MLP(nn.Sequential):
    """Linear, GELU, Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, activation, last = self
        if isinstance(first, Linear):
            return last(first(x, "gelu"))
        return last(activation(first(x)))  # an adapter stands around the layer


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
        self.mlp = MLP(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))
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
