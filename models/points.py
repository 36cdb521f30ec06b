"""Neighbourhoods of points as tokens (Shap-E's point-set embedding).

Shapes: B assets, N points, M centres, K neighbours, F encoded features, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["PointConv", "neighbours"]

RADIUS, N_NEIGHBOURS, WINDOW, STRIDE = 0.5, 64, 8, 4  # as released


class PointConv(nn.Module):
    """Two strided convolutions over each centre's list of neighbours, then their mean: M tokens.

    The release shuffles the neighbours at random, each channel apart, in evaluation too; here they come in the order of
    the cloud, so an asset always has one latent.

    The points' features enter the first convolution by a linear map alone, so the two are folded: 8·F columns instead
    of 8·D (at Shap-E's sizes 27 instead of 146 G multiply-adds).

    Args:
        width: D. n_centres: M; the first M points of the cloud are the centres.
    """

    def __init__(self, width: int, n_centres: int) -> None:
        super().__init__()
        self.n_centres = n_centres
        self.first = nn.Conv1d(3 + width, width, WINDOW, STRIDE)
        self.second = nn.Conv1d(width, width, WINDOW, STRIDE)

    def forward(self, xyz_BN3: torch.Tensor, features_BNF: torch.Tensor, embed: nn.Linear) -> torch.Tensor:
        """Tokens [B, M, D] of the first M points.

        Args:
            xyz_BN3: in the encoder's frame.
            features_BNF: the points' encoding, which `embed` maps to D channels.
        Raises: ValueError for fewer points than centres.
        """
        if xyz_BN3.shape[1] < self.n_centres:
            raise ValueError(f"this encoder needs at least {self.n_centres} surface points, got {xyz_BN3.shape[1]}")
        weight_D3w, weight_DDw = self.first.weight.split([3, embed.out_features], dim=1)
        folded_DFw = torch.einsum("odw,df->ofw", weight_DDw, embed.weight)
        bias_D = self.first.bias + torch.einsum("odw,d->o", weight_DDw, embed.bias)
        weight = torch.cat([weight_D3w, folded_DFw], dim=1)
        tokens = []
        for xyz_N3, features_NF in zip(xyz_BN3, features_BNF, strict=True):
            index_MK = neighbours(xyz_N3, self.n_centres)
            offsets_MK3 = xyz_N3[index_MK] - xyz_N3[: self.n_centres, None]
            rows_MKF = torch.cat([offsets_MK3, features_NF[index_MK]], dim=-1)
            h_MDK = F.silu(F.conv1d(_circular(rows_MKF.transpose(1, 2)), weight, bias_D, stride=STRIDE))
            h_MDK = F.silu(self.second(_circular(h_MDK)))
            tokens.append(h_MDK.mean(-1))
        return torch.stack(tokens)


@torch.no_grad()
def neighbours(xyz_N3: torch.Tensor, n_centres: int) -> torch.Tensor:
    """For each of the first M points, the first K points in the order of the cloud within RADIUS of it: [M, K].

    Where there are fewer, the first of them fills the rest (as PointNet++'s ball query).
    """
    distance2_MN = torch.cdist(xyz_N3[:n_centres], xyz_N3, compute_mode="donot_use_mm_for_euclid_dist").square()
    near_MN = distance2_MN <= RADIUS**2
    rank_MN = near_MN.cumsum(-1) - 1
    first_M1 = near_MN.to(torch.uint8).argmax(-1, keepdim=True)
    index_MK = first_M1.repeat(1, N_NEIGHBOURS)
    center, point = (near_MN & (rank_MN < N_NEIGHBOURS)).nonzero(as_tuple=True)
    index_MK[center, rank_MN[center, point]] = point
    return index_MK


def _circular(x_MDK: torch.Tensor) -> torch.Tensor:
    """Half a window of each end repeated at the other."""
    return F.pad(x_MDK, (WINDOW // 2, WINDOW // 2), mode="circular")
