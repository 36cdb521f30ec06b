"""The autoencoder's stages: each loss falls on a few objects, a stage goes on from another, wrong settings are said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shapeloom.config import load_config
from shapeloom.data_pipes.encoder_inputs import farthest_first, pick_rays, view_arrays
from shapeloom.data_pipes.loader import RawDataset
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.errors import UserError
from shapeloom.eval.encode import encode_stored
from shapeloom.eval.stored import surface_rows
from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.cameras import Cameras
from shapeloom.models.encoder import ViewInputs
from shapeloom.training.autoencoder import AutoencoderRun, build, run
from shapeloom.training.field_losses import mesh_views

SMALL = [
    *("model.width=32", "model.heads=2", "model.hidden=32", "model.n_latents=16", "model.channels=8"),
    *("model.encoder_layers=1", "model.decoder_layers=0", "model.field_frequencies=4", "optim.warmup_steps=0"),
    *("batch_size=2", "n_surface=64", "n_field=128", "n_rays=48", "n_coarse=16", "n_fine=16", "mesh_resolution=16"),
    *("log_every=1", "eval_every=0", "save_every=0", "eval_samples=2", "sheet_samples=1", "loss.latent=0"),
]
NO_POINTS = ["loss.sdf=0", "loss.occupancy=0", "loss.color=0"]
SHAP_E = ["model.field=nerstf", "model.row_norm=true", "model.generated_bias=false", "model.n_generated=4"]
SHAP_E += ["model.n_shared=2", "model.decoder_width=null"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, ProceduralSettings(count=8, n_surface=256, n_near=256, n_uniform=256, n_views=3, image_size=16))
    return folder


def settings(raw, out, *more) -> AutoencoderRun:
    return load_config(AutoencoderRun, overrides=[*SMALL, *more], values={"data": str(raw), "out": str(out)})


def losses(out) -> list[dict]:
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


STAGES = {
    "nerf": [*NO_POINTS, "loss.nerf_color=1", "loss.nerf_transmittance=1", *SHAP_E],
    "distill": [*NO_POINTS, "loss.distill_sdf=1", "loss.distill_color=1", *SHAP_E],
    "surface": [*NO_POINTS, "loss.surface_color=1", "loss.surface_transmittance=1", "loss.surface_beta=0.1"],
    "views alone": ["n_surface=0", "n_views=2", "model.patch_size=8"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_learns(raw, tmp_path, stage):
    run(settings(raw, tmp_path / "run", "steps=40", "optim.lr=5e-3", *STAGES[stage]))
    log = [line["loss"] for line in losses(tmp_path / "run")]
    assert np.mean(log[-5:]) < 0.8 * np.mean(log[:5]), log
    assert (tmp_path / "run" / "autoencoder" / "config.json").is_file()


def test_fine_tuning_on_rendered_meshes_goes_on_from_a_stage(raw, tmp_path):
    """Points first, so that there is a surface; then the rendered mesh alone, whose loss falls further."""
    run(settings(raw, tmp_path / "points", "steps=60", "optim.lr=5e-3"))
    init = f"init={tmp_path / 'points' / 'autoencoder'}"
    mesh = [*NO_POINTS, "loss.mesh=1", init, "model.width=64"]  # the folder's sizes win
    run(settings(raw, tmp_path / "mesh", "steps=25", "optim.lr=1e-3", *mesh))
    log = [line["mesh"] for line in losses(tmp_path / "mesh")]
    assert all(value > 0 for value in log) and np.mean(log[-5:]) < np.mean(log[:5]), log


def test_gradient_checkpointing_changes_nothing(raw, tmp_path):
    more = ["loss.nerf_color=1", "loss.nerf_transmittance=1", "n_views=1", "model.patch_size=8", *SHAP_E]
    stage = build(settings(raw, tmp_path, *more))
    batch = stage.batches(0, 1).batch(0)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            stage.model.enable_gradient_checkpointing()
        stage.model.zero_grad()
        loss_B, metrics = stage.loss(stage.model, batch)
        loss_B.mean().backward()
        found.append((loss_B.detach(), [p.grad.clone() for p in stage.model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6) and "nerf_color" in metrics
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_rays_and_view_points_meet_the_surface(raw):
    """A pixel's surface point projects back into the pixel, and its signed distance is about zero."""
    sample = RawDataset(raw, split=None, parts=("surface", "field", "albedo", "depth", "cameras"))[0]
    views = view_arrays(sample)
    assert views["seen"].any()
    for v in range(3):
        camera = np.linalg.inv(sample.cameras.camera_to_world[v])
        row, column = np.nonzero(views["seen"][v])
        local = views["position"][v][:, row, column].T @ camera[:3, :3].T + camera[:3, 3]
        x = 8 + sample.cameras.focal[v] * local[:, 0] / -local[:, 2]
        y = 8 - sample.cameras.focal[v] * local[:, 1] / -local[:, 2]
        assert np.abs(x - column - 0.5).max() < 1e-2 and np.abs(y - row - 0.5).max() < 1e-2
        distance = np.linalg.norm(views["position"][v][:, row, column].T[:, None] - sample.surface_xyz[None], axis=-1)
        assert np.median(distance.min(1)) < 0.1
    rays = pick_rays(sample, 50, np.random.default_rng(0))
    every = sample.cameras.rays()[1].reshape(-1, 3)
    assert np.abs(every[None] - rays["direction"][:, None]).max(-1).min(1).max() < 1e-6
    assert rays["rgba"].shape == (50, 4) and 0 < rays["rgba"][:, 3].mean() < 1


def test_evaluation_encodes_what_the_autoencoder_reads(raw):
    """Neighbourhoods and views, where it has them; a model without an encoder is one sentence."""
    torch.manual_seed(0)
    sizes = {"n_latents": 16, "channels": 8, "width": 32, "heads": 2, "hidden": 16}
    model = Autoencoder(**sizes, point_features="nerf", n_centres=32, patch_size=8).eval()
    data = RawDataset(raw, split=None, parts=("albedo", "depth", "cameras"))
    z = encode_stored(model, data.shards, [0, 3])
    assert z.shape == (2, 16, 8) and torch.allclose(encode_stored(model, data.shards, [3])[0], z[1], atol=1e-5)
    views = {name: torch.from_numpy(array)[None] for name, array in view_arrays(data[0]).items()}
    points = surface_rows(data.shards, 0)
    points = torch.from_numpy(points[farthest_first(points[:, :3], 32)])[None]
    with torch.no_grad():
        assert torch.allclose(model.encode(points, ViewInputs(**views)), z[:1], atol=1e-5)
    with pytest.raises(UserError, match="without an encoder"):
        encode_stored(Autoencoder(**sizes, with_encoder=False), data.shards, [0])


def test_farthest_first_spreads_and_keeps_every_point():
    xyz = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    order = farthest_first(xyz, 20)
    assert sorted(order) == list(range(200)) and order[0] == 0
    for k in range(1, 20):
        distance = np.linalg.norm(xyz[:, None] - xyz[order[:k]][None], axis=-1).min(1)
        assert distance[order[k]] == pytest.approx(distance.max())
    again = farthest_first(xyz[order], 20)
    assert again[:20].tolist() == list(range(20))  # a cloud in that order stays as it is


def test_a_field_without_a_surface_draws_nothing_and_has_no_gradient():
    torch.manual_seed(0)
    model = Autoencoder(n_latents=16, channels=8, width=32, heads=2, hidden=16)
    with torch.no_grad():
        model.decoder.head.out[-1].bias[0] = 1e3  # outside everywhere
    cameras = Cameras(np.eye(4)[None] + np.eye(4)[None] * 0, np.array([8.0]), 8, 8)
    z = torch.zeros(1, 16, 8)
    where = torch.from_numpy(cameras.camera_to_world), torch.from_numpy(cameras.focal)
    rgb, alpha = mesh_views(model.decode(z), *where, 8, 8)
    assert rgb.shape == (1, 8, 8, 3) and alpha.max() == 0
    alpha.sum().backward()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["n_surface=0"], "would see nothing"),
        (["n_views=2"], "model.patch_size"),
        (["model.n_centres=100", "model.point_features=nerf"], "at least the model's n_centres, 100"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(raw, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        build(settings(raw, tmp_path, *more))
