"""Patches of a posed view as tokens (Shap-E's multi-view point cloud embedding), with its two convolutions folded.

Shapes: one view of H x W pixels, S patches, F features a pixel, E hidden channels, D width, p patch size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .transformer import fourier_features

__all__ = ["ViewPatches"]


class ViewPatches(nn.Module):
    """Encoded colour, camera centre and surface point of each pixel → 3x3 convolution → one token a patch.

    No activation stands between the 3x3 and the patch convolution, so they are one convolution with a (p + 2)-wide
    kernel and stride p: a quarter of the operations at Shap-E's sizes (84 + 34 → 29 G multiply-adds a view of 256²).
    Further, and as exactly: the camera centre's features are the same in all seen pixels, and the background's in all
    others, so each is one channel with a kernel of its own (279 → 188 channels); and only patches that see something
    of the object are multiplied with the rest.

    Args:
        width: D. patch_size: p, pixels. n_frequencies: of the encoding, without π (Shap-E: 15).
    """

    def __init__(self, width: int, patch_size: int, n_frequencies: int) -> None:
        super().__init__()
        self.patch_size, self.n_frequencies = patch_size, n_frequencies
        n_features = 9 * (1 + 2 * n_frequencies)
        self.background = nn.Parameter(torch.randn(n_features) * 0.01)
        self.pixels = nn.Conv2d(n_features, width // 2, kernel_size=3, padding=1)
        self.patches = nn.Conv2d(width // 2, width, kernel_size=patch_size, stride=patch_size)
        self._kept: tuple[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] | None = None

    def folded_kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two convolutions as one: kernel [D, F, p + 2, p + 2], bias [D]. Kept while the weights are the same."""
        weights = (self.pixels.weight, self.pixels.bias, self.patches.weight, self.patches.bias)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return self._fold()
        key = tuple(number for weight in weights for number in (weight.data_ptr(), _version(weight)))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._fold())
        return self._kept[1]

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Patch weights over the pixels' outputs, spread by the 3x3 weights over the pixels' inputs: a full correlation.
        inner_FEkk = self.pixels.weight.transpose(0, 1).flip(-1, -2)
        kernel_DFqq = F.conv2d(self.patches.weight, inner_FEkk, padding=2)
        bias_D = self.patches.bias + torch.einsum("deuv,e->d", self.patches.weight, self.pixels.bias)
        return kernel_DFqq, bias_D

    def forward(
        self,
        kernel: tuple[torch.Tensor, torch.Tensor],
        rgb_3HW: torch.Tensor,
        seen_HW: torch.Tensor,
        origin_3: torch.Tensor,
        position_3HW: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens [S, D] of one view, row by row.

        Args:
            kernel: of `folded_kernel`.
            rgb_3HW: sRGB in [0, 1]. seen_HW: bool. origin_3, position_3HW: in the encoder's frame.
        Raises: ValueError if the image's sides are not multiples of the patch size.
        """
        kernel_DFqq, bias_D = kernel
        size = self.patch_size
        if rgb_3HW.shape[1] % size or rgb_3HW.shape[2] % size:
            raise ValueError(f"views of {tuple(rgb_3HW.shape[1:])} pixels do not divide into patches of {size}")
        third = len(self.background) // 3
        # In the released order: colour, camera centre, surface point.
        kernels = kernel_DFqq.split(third, dim=1)
        origin_F = self._encode(origin_3)
        seen_11HW = seen_HW[None, None].to(rgb_3HW.dtype)
        flat_D2qq = torch.stack(
            [
                torch.einsum("dfuv,f->duv", kernels[1], origin_F),
                torch.einsum("dfuv,f->duv", kernel_DFqq, self.background),
            ],
            dim=1,
        )
        masks_12HW = torch.cat([seen_11HW, 1 - seen_11HW], dim=1)
        tokens_SD = F.conv2d(masks_12HW, flat_D2qq, bias_D, stride=size, padding=1)[0].flatten(1).T

        features_HWF = torch.cat(
            [self._encode(rgb_3HW.movedim(0, -1) * 2 - 1), self._encode(position_3HW.movedim(0, -1))], dim=-1
        )
        features_HWF = torch.where(seen_HW[..., None], features_HWF, 0.0)
        windows_SFqq = self._windows(features_HWF)
        touched_S = self._windows(seen_HW[..., None].to(rgb_3HW.dtype)).flatten(1).amax(-1) > 0
        rows_TX = windows_SFqq[touched_S].flatten(1)
        kernel_DX = torch.cat([kernels[0], kernels[2]], dim=1).flatten(1)
        return tokens_SD.index_add(0, touched_S.nonzero()[:, 0], rows_TX @ kernel_DX.T)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return fourier_features(x, self.n_frequencies, base=1.0)

    def _windows(self, features_HWF: torch.Tensor) -> torch.Tensor:
        """The (p + 2)-wide window of each patch, zero outside the image: a view [S, F, p + 2, p + 2] (then copied)."""
        size = self.patch_size
        padded = F.pad(features_HWF, (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(0, size + 2, size).unfold(1, size + 2, size)
        return windows.flatten(0, 1)


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
