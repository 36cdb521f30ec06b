"""Shap-E's encoder against a plain reading of its description, on the released tensor names, without any folding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from shap_e_models import pipeline, released
from torch.nn import functional as F

from shapeloom.checkpoints.pipeline import load
from shapeloom.checkpoints.shap_e import import_shap_e
from shapeloom.models.autoencoder import Autoencoder, noised
from shapeloom.models.decoder import to_z_up
from shapeloom.models.encoder import ViewInputs
from shapeloom.models.points import neighbours

W, HEADS, LAYERS, CENTRES = 64, 8, 2, 1024
SIDE = 32


def released_encoder(channels: int, n_latents: int) -> dict[str, torch.Tensor]:
    """Random tensors under the released names, at a small width."""
    g = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / max(math.prod(shape[1:]), 1) ** 0.5

    shapes: dict[str, tuple[int, ...]] = {
        "output_tokens": (n_latents, W), "input_proj.weight": (W, 186), "input_proj.bias": (W,),
        "output_proj.weight": (channels, W), "output_proj.bias": (channels,),
        "mv_pcl_embed.weight": (W // 2, 279, 3, 3), "mv_pcl_embed.bias": (W // 2,), "mv_pcl_embed.unk_token": (279,),
        "patch_emb.weight": (W, W // 2, 8, 8), "patch_emb.bias": (W,),
        "point_conv.mlp_convs.0.weight": (W, W + 3, 8, 1), "point_conv.mlp_convs.0.bias": (W,),
        "point_conv.mlp_convs.1.weight": (W, W, 8, 1), "point_conv.mlp_convs.1.bias": (W,),
    }  # fmt: skip
    norms = ["ln_pre", "ln_post"]
    for at in ("encoder.0", "encoder.1"):
        block = f"{at}.resblocks.0"
        norms += [f"{block}.ln_{i}" for i in (1, 2, 3)]
        shapes |= {f"{block}.attn.c_q.weight": (W, W), f"{block}.attn.c_q.bias": (W,)}
        shapes |= {f"{block}.attn.c_kv.weight": (2 * W, W), f"{block}.attn.c_kv.bias": (2 * W,)}
    for i in range(LAYERS):
        block = f"processor.resblocks.{i}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes |= {f"{block}.attn.c_qkv.weight": (3 * W, W), f"{block}.attn.c_qkv.bias": (3 * W,)}
    for block in ["encoder.0.resblocks.0", "encoder.1.resblocks.0", *[f"processor.resblocks.{i}" for i in range(2)]]:
        shapes |= {f"{block}.attn.c_proj.weight": (W, W), f"{block}.attn.c_proj.bias": (W,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * W, W), f"{block}.mlp.c_fc.bias": (4 * W,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (W, 4 * W), f"{block}.mlp.c_proj.bias": (W,)}
    state = {name: random(*shape) for name, shape in shapes.items()}
    for norm in norms:
        state |= {f"{norm}.weight": 1 + 0.1 * random(W), f"{norm}.bias": 0.1 * random(W)}
    return {f"encoder.{name}": value for name, value in state.items()}


def encode_plainly(state, xyz, rgb, views) -> torch.Tensor:
    """One asset's latent before tanh, [L, C], in Shap-E's frame. views: (rgb_3HW, seen_HW, origin_3, position_3HW)."""

    def p(name):
        return state[f"encoder.{name}"]

    def posenc(x):
        xb = torch.cat([x * 2.0**k for k in range(15)], dim=-1)
        return torch.cat([x, torch.sin(xb), torch.sin(xb + math.pi / 2)], dim=-1)

    def linear(name, x):
        return x @ p(f"{name}.weight").T + p(f"{name}.bias")

    def norm(name, x):
        return F.layer_norm(x, (W,), p(f"{name}.weight"), p(f"{name}.bias"))

    def attend(q, k, v):
        weights = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(W // HEADS)
        return torch.einsum("hnm,mhd->nhd", weights.softmax(-1), v).flatten(1)

    def mlp(at, x):
        return linear(f"{at}.mlp.c_proj", F.gelu(linear(f"{at}.mlp.c_fc", x)))

    features = linear("input_proj", posenc(torch.cat([xyz, rgb], -1)))
    centres = []
    for i in range(CENTRES):
        near = torch.nonzero((xyz - xyz[i]).square().sum(-1) <= 0.25)[:, 0].tolist()[:64]
        near += [near[0]] * (64 - len(near))
        h = torch.cat([xyz[near] - xyz[i], features[near]], -1).T[None, :, :, None]
        for layer in range(2):
            weight, bias = p(f"point_conv.mlp_convs.{layer}.weight"), p(f"point_conv.mlp_convs.{layer}.bias")
            h = torch.cat([h[:, :, -4:], h, h[:, :, :4]], dim=2)
            h = F.conv2d(h, weight, bias, stride=(4, 1))
            h = h * torch.sigmoid(h)
        centres.append(h.mean(2)[0, :, 0])
    x = norm("ln_pre", torch.cat([torch.stack(centres), p("output_tokens")]))

    tokens = []
    for image, seen, origin, position in views:
        channels = [posenc(t.movedim(0, -1)) for t in (image * 2 - 1, origin[:, None, None].expand(3, SIDE, SIDE))]
        channels.append(posenc(position.movedim(0, -1)))
        pixels = torch.where(seen[..., None], torch.cat(channels, -1), p("mv_pcl_embed.unk_token"))
        h = F.conv2d(pixels.movedim(-1, 0)[None], p("mv_pcl_embed.weight"), p("mv_pcl_embed.bias"), padding=1)
        tokens.append(F.conv2d(h, p("patch_emb.weight"), p("patch_emb.bias"), stride=8)[0].flatten(1).T)
    for i, data in enumerate((features, torch.cat(tokens))):
        at = f"encoder.{i}.resblocks.0"
        q = linear(f"{at}.attn.c_q", norm(f"{at}.ln_1", x)).unflatten(-1, (HEADS, -1))
        k, v = linear(f"{at}.attn.c_kv", norm(f"{at}.ln_2", data)).unflatten(-1, (HEADS, -1)).chunk(2, -1)
        x = x + linear(f"{at}.attn.c_proj", attend(q, k, v))
        x = x + mlp(at, norm(f"{at}.ln_3", x))
    for i in range(LAYERS):
        at = f"processor.resblocks.{i}"
        q, k, v = linear(f"{at}.attn.c_qkv", norm(f"{at}.ln_1", x)).unflatten(-1, (HEADS, -1)).chunk(3, -1)
        x = x + linear(f"{at}.attn.c_proj", attend(q, k, v))
        x = x + mlp(at, norm(f"{at}.ln_2", x))
    return linear("output_proj", norm("ln_post", x[CENTRES:]))


@pytest.fixture(scope="module")
def transmitter(tmp_path_factory):
    """(tensors under the released names, our autoencoder imported from them)."""
    at = tmp_path_factory.mktemp("transmitter")
    theirs = pipeline("text")
    theirs.save_pretrained(at / "theirs")
    denoiser, decoder = released("text", theirs)
    n_latents = 4 * theirs.shap_e_renderer.config.d_hidden
    state = released_encoder(theirs.shap_e_renderer.config.d_latent, n_latents)
    state |= {k if k.startswith("renderer") else f"encoder.{k}": v for k, v in decoder.items()}
    torch.save(denoiser, at / "text_cond.pt")
    torch.save(state, at / "transmitter.pt")
    import_shap_e(at, at / "ours", clip=str(at / "theirs"))
    return state, load(at / "ours").autoencoder


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    surface = torch.cat([torch.rand(1, 1500, 3, generator=g) * 1.6 - 0.8, torch.zeros(1, 1500, 3)], -1)
    surface = torch.cat([surface, torch.rand(1, 1500, 3, generator=g)], -1)
    seen = torch.rand(1, 3, SIDE, SIDE, generator=g) < 0.4
    seen[:, :, :, 16:] = False
    seen[:, 1] = False  # a view that sees nothing
    views = ViewInputs(
        rgb=torch.rand(1, 3, 3, SIDE, SIDE, generator=g),
        seen=seen,
        origin=torch.randn(1, 3, 3, generator=g) * 3,
        position=torch.rand(1, 3, 3, SIDE, SIDE, generator=g) * 2 - 1,
    )
    return surface, views


@torch.no_grad()
def test_latents_are_the_release_read_plainly(transmitter, inputs):
    state, model = transmitter
    surface, views = inputs
    up = to_z_up(views.position[0].movedim(1, -1)).movedim(-1, 1)
    plain_views = list(zip(views.rgb[0], views.seen[0], to_z_up(views.origin[0]), up))
    expected = encode_plainly(state, to_z_up(surface[0, :, :3]), surface[0, :, 6:], plain_views).tanh()
    got = model.encode(surface, views)[0]
    # The encoding's highest frequency is 2^14, so a last bit of a coordinate is 1e-3 of a feature; 1e-4 after the net.
    assert got.std() > 0.1 and (got - expected).abs().max() < 2e-4 * expected.abs().max()


@torch.no_grad()
def test_encoding_is_deterministic_and_either_input_may_be_absent(transmitter, inputs):
    """The release shuffles neighbours at random in evaluation too."""
    _, model = transmitter
    surface, views = inputs
    whole, state = model.encode(surface, views), torch.get_rng_state()
    assert torch.equal(whole, model.encode(surface, views)) and torch.equal(state, torch.get_rng_state())
    points, pictures = model.encode(surface), model.encode(None, views)
    assert points.shape == pictures.shape == whole.shape and not torch.allclose(points, pictures, atol=1e-2)
    fewer = ViewInputs(views.rgb[:, :1], views.seen[:, :1], views.origin[:, :1], views.position[:, :1])
    assert model.encode(surface, fewer).shape == whole.shape
    with pytest.raises(ValueError, match="nothing to encode"):
        model.encode(None)


@torch.no_grad()
def test_the_order_of_views_and_batch_mates_do_not_matter(transmitter, inputs):
    _, model = transmitter
    surface, views = inputs
    turned = ViewInputs(*(getattr(views, name).flip(1) for name in ("rgb", "seen", "origin", "position")))
    assert torch.allclose(model.encode(surface, views), model.encode(surface, turned), atol=1e-5)
    other = torch.rand(1, 1500, 9, generator=torch.Generator().manual_seed(9)) - 0.5
    pair = ViewInputs(*(getattr(views, name).repeat(2, *[1] * (getattr(views, name).ndim - 1))
                        for name in ("rgb", "seen", "origin", "position")))  # fmt: skip
    both = model.encode(torch.cat([surface, other]), pair)
    assert torch.allclose(both[:1], model.encode(surface, views), atol=1e-5)


def test_too_few_points_and_wrong_image_sizes_are_sentences(transmitter, inputs):
    _, model = transmitter
    surface, views = inputs
    with pytest.raises(ValueError, match="at least 1024 surface points, got 100"):
        model.encode(surface[:, :100])
    cut = ViewInputs(views.rgb[..., :30], views.seen[..., :30], views.origin, views.position[..., :30])
    with pytest.raises(ValueError, match="do not divide into patches of 8"):
        model.encode(None, cut)


def test_neighbours_are_the_first_in_order():
    xyz = torch.tensor([[0.0, 0, 0], [9.0, 0, 0], [0.1, 0, 0], [0.6, 0, 0], [0.4, 0, 0]])
    index = neighbours(xyz, 2)
    assert index.shape == (2, 64) and index[0, :4].tolist() == [0, 2, 4, 0] and set(index[1].tolist()) == {1}


def test_gradients_pass_through_folded_kernels_with_and_without_checkpointing():
    torch.manual_seed(0)
    sizes = {"n_latents": 16, "channels": 8, "width": 32, "heads": 2, "encoder_layers": 1, "hidden": 16}
    model = Autoencoder(**sizes, point_features="nerf", n_centres=20, patch_size=8, norm_in=True)
    surface = torch.rand(2, 80, 9) - 0.5
    views = ViewInputs(
        torch.rand(2, 1, 3, 16, 16), torch.rand(2, 1, 16, 16) < 0.5, torch.randn(2, 1, 3), torch.randn(2, 1, 3, 16, 16)
    )

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.encode(surface, views).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.encoder.named_parameters() if p.grad is not None}

    plain = gradients()
    assert plain.keys() == dict(model.encoder.named_parameters()).keys() and all(g.any() for g in plain.values())
    model.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_the_kept_kernel_follows_the_weights():
    model = Autoencoder(n_latents=16, channels=8, width=32, heads=2, hidden=16, patch_size=8).eval()
    views = ViewInputs(torch.rand(1, 1, 3, 8, 8), torch.ones(1, 1, 8, 8).bool(), torch.randn(1, 1, 3),
                       torch.randn(1, 1, 3, 8, 8))  # fmt: skip
    with torch.no_grad():
        before = model.encode(None, views)
        assert torch.equal(before, model.encode(None, views))
        model.encoder.embed_views.pixels.weight.mul_(2)
        assert not torch.allclose(before, model.encode(None, views), atol=1e-4)


def test_bottleneck_noise():
    z, noise = torch.full((1000, 1, 1), 0.5), torch.ones(1000, 1, 1)
    level = torch.arange(1000) / 1000
    out = noised(z, noise, level, "diffusion", 0.1)[:, 0, 0]
    assert (out[:900] == 0.5).all() and (out[920:] != 0.5).all()  # a tenth of the assets, the first hardly
    t = np.floor((level[900:].numpy() - 0.9) / 0.1 * 1024 + 1e-4) + 1
    signal = 1 - (t / 1024) ** 5
    np.testing.assert_allclose(out[900:], np.sqrt(signal) * 0.5 + np.sqrt(1 - signal), atol=1e-3)
    assert torch.allclose(noised(z, noise, level, "additive", 0.1)[:, 0, 0], 0.5 + 0.1 * level)
