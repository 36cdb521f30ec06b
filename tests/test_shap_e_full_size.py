"""The published sizes themselves, with random weights of diffusers' classes: 300 M denoiser, 226 M decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.shap_e.renderer import StratifiedRaySampler
from shap_e_models import FULL, InTheirFrame, prior, renderer, scheduler

from shapeloom.checkpoints.shap_e import _autoencoder, _denoiser
from shapeloom.models.conditioner import TextFeatures
from shapeloom.models.decoder import to_z_up
from shapeloom.models.guidance import guided, sample_latents, shap_e_scheduler
from shapeloom.models.mesh import extract_mesh
from shapeloom.models.nerf import RayNoise, render_rays
from shapeloom.models.pipeline import condition_from


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.inference_mode()
def test_text300m_samples_what_diffusers_samples():
    """Two Heun steps, three guided calls, at guidance 15: the whole run of 64 steps is launch/bench/parity.py."""
    theirs = prior("text", FULL, 768)
    ours = _denoiser("text", dict(theirs.state_dict()), "prior", 16, released=False)
    assert abs(sum(p.numel() for p in ours.parameters()) - 315_692_032) == 0
    pooled = torch.nn.functional.normalize(torch.randn(1, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    noise = torch.randn(1, 1024, 1024, generator=torch.Generator().manual_seed(1))
    features = TextFeatures(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), pooled)
    predict = guided(ours, condition_from(features, None, ours), text_scale=15.0, image_scale=1.0)
    got = sample_latents(predict, noise, shap_e_scheduler(), steps=2)

    solver = scheduler()
    solver.set_timesteps(2)
    x, embedding = noise * solver.init_noise_sigma, torch.cat([torch.zeros_like(pooled), pooled]) * 768**0.5
    for t in solver.timesteps:
        scaled = solver.scale_model_input(torch.cat([x, x]), t)
        out = theirs(scaled, timestep=t, proj_embedding=embedding).predicted_image_embedding[..., :1024]
        empty, text = out.chunk(2)
        x = solver.step(empty + 15.0 * (text - empty), t, x).prev_sample
    assert (got - x).norm() / x.norm() < 1e-4 and x.std() > 0.1


@torch.inference_mode()
def test_decoder_renders_what_diffusers_renders():
    theirs = renderer(FULL)
    ours = _autoencoder(dict(theirs.state_dict()), "renderer", released=False)
    z = torch.randn(1, 1024, 1024, generator=torch.Generator().manual_seed(2)).tanh()
    field = ours.decode(z)
    generated = theirs.params_proj(z)
    for i in range(4):
        weight = generated[f"nerstf.mlp.{i}.weight"][0]
        theirs.mlp.mlp[i].weight.copy_(weight)
        assert (field.weights[i][0] - weight).abs().max() < 1e-5

    g = torch.Generator().manual_seed(3)
    origins = torch.nn.functional.normalize(torch.randn(64, 3, generator=g), dim=-1) * 4
    directions = torch.nn.functional.normalize(torch.rand(64, 3, generator=g) - 0.5 - origins, dim=-1)
    rays = torch.stack([to_z_up(origins), to_z_up(directions)], dim=1)[None]
    _, fine, coarse = theirs.render_rays(rays, StratifiedRaySampler(), 64)
    expected, _, _ = theirs.render_rays(rays, fine, 128, prev_model_out=coarse)
    torch.manual_seed(0)  # as their sampler does, before each of its draws
    noise = RayNoise(torch.rand(64, 64), torch.rand(64, 128), torch.rand(64, 128))
    seen = render_rays(field, origins, directions, noise=noise)
    assert (seen.over(torch.ones(3)) - expected[0]).abs().max() < 1 / 255 and seen.alpha.std() > 0.01

    mesh, dense = extract_mesh(InTheirFrame(field), 20)[0], theirs.decode_to_mesh(z, "cpu", grid_size=20)
    assert len(mesh.faces) > 100 and np.array_equal(mesh.faces, dense.faces.numpy())
    assert np.abs(mesh.vertices - dense.verts.numpy() * (21 / 19)).max() < 1e-4
