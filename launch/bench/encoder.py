"""Shap-E's encoder at its published size: ours against the same weights run in the release's order of operations.

    python -m shapeloom.launch.bench.encoder [--views 20] [--repeat 1]

Cost model, in G multiply-adds (G = 1e9), 16,384 points and 20 views of 256² with about 40 % of the patches seen:

    part                                   release   ours   why
    3x3 and patch convolution, 20 views      2,360    210   one 10x10 kernel, 188 of 279 channels, seen patches alone
    neighbourhoods of 1,024 centres            189     70   the points' linear map folded into the first convolution
    keys and values of 36,864 tokens            77     77
    attention to them, 2,048 queries           155    155
    11 layers over 2,048 tokens                380    380
    sum                                      3,161    892   → 3.5x at equal efficiency

Memory: the release holds the encoded pixels of all views (20·256²·279 floats, 1.5 GB) and what the 3x3 convolution
makes of them (2.7 GB) at once; here one view's windows (1,024·188·100 floats, 77 MB).

"release" below is a plain reading of it (unfolded convolutions, all views at once, attention as two einsums and a
softmax), not the released program itself, which is no package; the two agree to rounding.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from ...models.autoencoder import SHAP_E, Autoencoder
from ...models.cameras import orbit
from ...models.decoder import to_z_up
from ...models.encoder import AssetEncoder, ViewInputs
from ...models.points import STRIDE, WINDOW, neighbours
from ...models.transformer import Block, fourier_features
from .measure import finish, interleaved, peak_rss_mb


def release_order(encoder: AssetEncoder, surface_BN9: torch.Tensor, views: ViewInputs) -> torch.Tensor:
    """What `encoder` computes, in the release's order of operations. Returns unbounded latents [B, L, C]."""
    xyz_BN3 = to_z_up(surface_BN9[..., :3])
    tokens_BND = encoder.embed_points(_posenc(torch.cat([xyz_BN3, surface_BN9[..., 6:]], dim=-1)))
    x_BLD = torch.cat([_point_conv(encoder, xyz_BN3, tokens_BND), encoder.queries.expand(len(xyz_BN3), -1, -1)], dim=1)
    x_BLD = encoder.norm_in(x_BLD)
    x_BLD = _block(encoder.read_points, x_BLD, encoder.norm_points(tokens_BND))
    x_BLD = _block(encoder.read_views, x_BLD, encoder.norm_views(_view_tokens(encoder, views)))
    for block in encoder.blocks:
        x_BLD = _block(block, x_BLD)
    return encoder.project(encoder.norm_out(x_BLD[:, -encoder.n_latents :]))


def _posenc(x: torch.Tensor) -> torch.Tensor:
    return fourier_features(x, 15, base=1.0)


def _point_conv(encoder: AssetEncoder, xyz_BN3: torch.Tensor, tokens_BND: torch.Tensor) -> torch.Tensor:
    conv, rows = encoder.point_conv, []
    for xyz_N3, tokens_ND in zip(xyz_BN3, tokens_BND, strict=True):
        index_MK = neighbours(xyz_N3, conv.n_centres)
        offsets = xyz_N3[index_MK] - xyz_N3[: conv.n_centres, None]
        h_MDK = torch.cat([offsets, tokens_ND[index_MK]], dim=-1).transpose(1, 2)
        for layer in (conv.first, conv.second):
            h_MDK = F.pad(h_MDK, (WINDOW // 2, WINDOW // 2), mode="circular")
            h_MDK = F.conv1d(h_MDK, layer.weight, layer.bias, stride=STRIDE)
            h_MDK = h_MDK * torch.sigmoid(h_MDK)
        rows.append(h_MDK.mean(-1))
    return torch.stack(rows)


def _view_tokens(encoder: AssetEncoder, views: ViewInputs) -> torch.Tensor:
    patches = encoder.embed_views
    origin_BVHW3 = to_z_up(views.origin)[:, :, None, None].expand(*views.seen.shape, 3)
    position_BVHW3 = to_z_up(views.position.movedim(2, -1))
    color_BVHW3 = views.rgb.movedim(2, -1) * 2 - 1
    pixels = torch.cat([_posenc(color_BVHW3), _posenc(origin_BVHW3), _posenc(position_BVHW3)], dim=-1)
    pixels = torch.where(views.seen[..., None], pixels, patches.background)
    h = patches.pixels(pixels.movedim(-1, 2).flatten(0, 1))
    h = patches.patches(h)
    return h.flatten(2).transpose(1, 2).unflatten(0, views.seen.shape[:2]).flatten(1, 2)


def _block(block: Block, x_BND: torch.Tensor, context_BMD: torch.Tensor | None = None) -> torch.Tensor:
    attention = block.attention
    h_BND = block.norm_attention(x_BND)
    q = attention.query(h_BND).unflatten(-1, (attention.heads, -1))
    kv = attention.key_value(h_BND if context_BMD is None else context_BMD)
    k, v = kv.unflatten(-1, (2, attention.heads, -1)).unbind(2)
    scale = q.shape[-1] ** -0.25  # the release scales queries and keys alike
    weights = torch.einsum("bnhd,bmhd->bhnm", q * scale, k * scale).softmax(-1)
    x_BND = x_BND + attention.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
    return x_BND + block.mlp(block.norm_mlp(x_BND))


def inputs(n_points: int, n_views: int, size: int) -> tuple[torch.Tensor, ViewInputs]:
    """A coloured ball of radius .8 seen from an orbit: points on it, and its pixels' true surface points."""
    generator = torch.Generator().manual_seed(0)
    normal_N3 = F.normalize(torch.randn(n_points, 3, generator=generator), dim=-1)
    surface = torch.cat([0.8 * normal_N3, normal_N3, normal_N3 * 0.5 + 0.5], dim=-1)[None]
    cameras = orbit([360 * v / n_views for v in range(n_views)], 20, size=size)
    origins, directions = (torch.from_numpy(rays) for rays in cameras.rays())
    along = (origins * directions).sum(-1)
    inside = along**2 - origins.square().sum(-1) + 0.8**2
    position = origins + (-along - inside.clamp(min=0).sqrt())[..., None] * directions
    views = ViewInputs(
        rgb=(position / 1.6 + 0.5).clamp(0, 1).movedim(-1, 1)[None],
        seen=(inside > 0)[None],
        origin=origins[None, :, 0, 0],
        position=position.movedim(-1, 1)[None],
    )
    return surface, views


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=16_384)
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("making the published encoder with random weights", flush=True)
    model = Autoencoder(**SHAP_E).eval()
    encoder = model.encoder
    surface, views = inputs(options.points, options.views, options.size)
    print("folding the convolutions (once a model), then one warm-up", flush=True)
    fold = interleaved({"fold": encoder.embed_views.folded_kernel}, 1)["fold"]
    ours = encoder(surface, views)
    print("the release's order of operations (a minute or two)", flush=True)
    theirs = release_order(encoder, surface, views)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    seconds = interleaved(
        {"ours": lambda: encoder(surface, views), "release": lambda: release_order(encoder, surface, views)},
        options.repeat,
    )
    print("memory", flush=True)
    finish(
        {
            "bench": "encoder",
            "points": options.points,
            "views": options.views,
            "size": options.size,
            "seen_patches": float(F.max_pool2d(views.seen[0, :, None].float(), 8).mean()),
            "ours_s": seconds["ours"],
            "fold_once_s": fold,
            "release_s": seconds["release"],
            "ratio": seconds["release"] / seconds["ours"],
            "largest_difference": difference,
            "ours_peak_mb": peak_rss_mb(lambda: encoder(surface, views)),
            "release_peak_mb": peak_rss_mb(lambda: release_order(encoder, surface, views)),
        }
    )


if __name__ == "__main__":
    main()
