"""Released Shap-E weights: read from either form, they give what diffusers gives; and the way back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from shap_e_models import SMALL, InTheirFrame, pipeline, released

from shapeloom.checkpoints.diffusers_export import export_diffusers
from shapeloom.checkpoints.pipeline import load
from shapeloom.checkpoints.shap_e import import_shap_e
from shapeloom.models.decoder import to_z_up
from shapeloom.models.mesh import extract_mesh
from shapeloom.models.pipeline import condition_from

PROMPT = "a red Cube, left of a blue ball"
KINDS = ("text", "image")


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """(kind, diffusers' pipeline, ours imported from its folder, that folder)."""
    at = tmp_path_factory.mktemp(request.param)
    theirs = pipeline(request.param)
    theirs.save_pretrained(at / "theirs")
    import_shap_e(at / "theirs", at / "ours")
    return request.param, theirs, load(at / "ours"), at


def given(kind):
    return {"text": [PROMPT]} if kind == "text" else {"image": [picture()]}


def noise(seed=3):
    return torch.randn(1, 4 * SMALL["hidden"], SMALL["channels"], generator=torch.Generator().manual_seed(seed))


def their_latents(kind, theirs, steps, scale):
    given_to_them = {"prompt": PROMPT} if kind == "text" else {"image": picture()}
    # The image pipeline scales only the noise that it draws itself.
    start = noise() if kind == "text" else noise() * theirs.scheduler.init_noise_sigma
    out = theirs(
        **given_to_them,
        latents=start.flatten(1) if kind == "text" else start,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
    )
    return out.images


@pytest.mark.parametrize("scale", [1.0, 15.0])
def test_latents_after_a_full_sampling_run(both, scale):
    kind, theirs, ours, _ = both
    # diffusers sets its noise scale with the steps
    theirs.scheduler.set_timesteps(64)
    expected = their_latents(kind, theirs, 64, scale)
    got = ours.generate_latents(
        given(kind).get("text"), given(kind).get("image"), [3], steps=64, text_guidance=scale, image_guidance=scale
    )
    error = (got - expected).norm() / expected.norm()
    assert error < 1e-4 and expected.std() > 0.1


def test_conditions_are_shap_es(both):
    """Text: unit vector times sqrt(768), zeros when absent. Image: the last block's grid, no norm, no class token."""
    kind, theirs, ours, _ = both
    if kind == "text":
        expected = theirs._encode_prompt([PROMPT, "x " * 100], "cpu", 1, False)
        features = ours.conditioner.encode_text([PROMPT, "x " * 100])
        assert torch.allclose(features.pooled * math.sqrt(768), expected, atol=1e-5)
        assert torch.allclose(features.pooled.norm(dim=-1), torch.ones(2))
        text, image = features, None
    else:
        pixels = theirs.image_processor(picture(), return_tensors="pt").pixel_values
        assert torch.allclose(ours.conditioner.encode_image([picture()]).tokens, theirs._encode_image(
            pixels, "cpu", 1, False), atol=1e-4)  # fmt: skip
        text, image = None, ours.conditioner.encode_image([picture()])
    absent = condition_from(text, image, ours.denoiser).keep(text=False, image=False)
    tokens, mask, _ = ours.denoiser._prefix(absent)
    layer = ours.denoiser.text_pooled if kind == "text" else ours.denoiser.image_tokens
    assert mask is None and torch.allclose(tokens[0], layer(torch.zeros_like(
        text.pooled[:1] if kind == "text" else image.tokens[0])), atol=1e-6)  # fmt: skip


def test_released_files_are_the_same_pipeline(both, tmp_path):
    kind, theirs, ours, at = both
    denoiser, decoder = released(kind, theirs)
    torch.save(denoiser, tmp_path / "any_name.pt")
    torch.save(decoder, tmp_path / "vector_decoder.pt", _use_new_zipfile_serialization=False)  # as older torch wrote
    import_shap_e(tmp_path, tmp_path / "out", clip=str(at / "theirs"))
    again = load(tmp_path / "out")
    for name in ("autoencoder", "denoiser", "conditioner"):
        expected, got = getattr(ours, name).state_dict(), getattr(again, name).state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), name


def test_meshes_are_diffusers_unshrunk(both):
    _, theirs, ours, _ = both
    z = noise().tanh()
    expected = theirs.shap_e_renderer.decode_to_mesh(z, "cpu", grid_size=24)
    mesh = extract_mesh(InTheirFrame(ours.decode(z)), 24)[0]
    assert len(mesh.faces) > 100 and np.array_equal(mesh.faces, expected.faces.numpy())
    # Theirs is shrunk towards the centre: the padded lattice is mapped to the same box.
    assert np.abs(mesh.vertices - expected.verts.numpy() * (25 / 23)).max() < 1e-4
    # Upright in our frame, it is the same surface.
    turned = extract_mesh(ours.decode(z), 24)[0]
    distance = torch.cdist(to_z_up(torch.from_numpy(turned.vertices)), torch.from_numpy(mesh.vertices))
    assert distance.amin(1).max() < 1e-3 and len(turned.vertices) == len(mesh.vertices)


def test_the_way_back(both, tmp_path):
    kind, theirs, ours, _ = both
    export_diffusers(ours, tmp_path / "back")
    back = DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert type(back).__name__ == type(theirs).__name__
    expected = theirs.prior.state_dict()
    unread = {"clip_mean", "clip_std"}  # Shap-E's files have no such tensors
    got = {key: value for key, value in back.prior.state_dict().items() if key not in unread}
    assert expected.keys() - got.keys() == unread and all(torch.equal(got[key], expected[key]) for key in got)
    back.set_progress_bar_config(disable=True)
    back.scheduler.set_timesteps(4)
    theirs.scheduler.set_timesteps(4)
    assert torch.allclose(their_latents(kind, back, 4, 3.0), their_latents(kind, theirs, 4, 3.0), atol=1e-5)
    z = noise().tanh()
    mine, other = (p.shap_e_renderer.decode_to_mesh(z, "cpu", grid_size=12) for p in (back, theirs))
    assert torch.equal(mine.faces, other.faces) and torch.allclose(mine.verts, other.verts, atol=1e-6)
