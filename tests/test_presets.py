"""The presets of a GPU at their real size, for one step on a CPU."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from latent_folders import four_latents, small_clip, write_latents

from shapeloom.config import load_config
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.models.autoencoder import SHAP_E, Autoencoder
from shapeloom.models.transformers_clip import TransformersConditioner
from shapeloom.training import autoencoder as autoencoder_stage
from shapeloom.training import denoiser as denoiser_stage
from shapeloom.training.autoencoder import AutoencoderRun
from shapeloom.training.denoiser import DenoiserRun
from shapeloom.training.ema import Ema, skeleton
from shapeloom.training.loop import Stage, make_optimiser, prepare_blocks
from shapeloom.training.parallel import Parallel


def first_step(config: DenoiserRun | AutoencoderRun) -> tuple[Stage, torch.Tensor, float]:
    """Build, forward, backward, update, average: the stage, the losses [B], and how far the average moved."""
    module = denoiser_stage if isinstance(config, DenoiserRun) else autoencoder_stage
    stage = module.build(config)
    last = "latent_out.weight" if isinstance(config, DenoiserRun) else "decoder.head.out.4.weight"
    last = last if last in stage.model.state_dict() else "decoder.head.out.2.weight"
    before = stage.model.get_parameter(last).detach().clone()
    shell = skeleton(stage.model)
    prepare_blocks(config, stage)
    parallel = Parallel(Accelerator(cpu=True), stage.model, make_optimiser(config, stage.model))
    ema = Ema(parallel, shell, config.ema_decay)
    loss_B, _ = stage.loss(stage.model, stage.batches(0, 1).batch(0))
    loss_B.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in stage.model.parameters())
    parallel.update(config.optim.lr)
    ema.update(1)
    return stage, loss_B.detach(), float((ema.module().get_parameter(last) - before).abs().max())


# Fewer inputs than the presets ask for, so that a step ends soon; the models are whole.
FEW = ["precision=no", "batch_size=1", "n_surface=1024", "n_views=1", "n_field=64", "n_rays=16"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "raw"
    generate(folder, ProceduralSettings(count=4, n_surface=1200, n_near=64, n_uniform=64, n_views=2, image_size=32))
    return folder


def test_small_autoencoder_takes_its_first_step(raw):
    config = load_config(AutoencoderRun, "small", "autoencoder", overrides=FEW, values={"data": str(raw)})
    stage, loss_B, moved = first_step(config)
    assert 60e6 < sum(p.numel() for p in stage.model.parameters()) < 75e6
    assert config.gradient_checkpointing and 0 < float(loss_B[0]) < 20 and moved > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes of matrix products, beside other tests
def test_shap_e_autoencoder_takes_its_first_step_at_full_size(raw):
    config = load_config(AutoencoderRun, "shap-e", "autoencoder", overrides=FEW, values={"data": str(raw)})
    stage, loss_B, moved = first_step(config)
    # The release has 51 columns more for a viewing direction that is always zero.
    assert sum(p.numel() for p in stage.model.parameters()) == 443_771_357 - 51 * 256
    assert config.gradient_checkpointing and 0 < float(loss_B[0]) < 20 and moved > 0


@pytest.mark.parametrize("section", ["autoencoder", "distill", "finetune"])
def test_shap_e_stages_share_the_published_model(section):
    config = load_config(AutoencoderRun, "shap-e", section)
    assert SHAP_E.items() <= config.model.model_dump().items() and config.loss.nerf_color == 1
    assert bool(config.loss.distill_sdf) == (section == "distill") and bool(config.loss.mesh) == (section == "finetune")


def test_small_denoiser_takes_its_first_step(tmp_path):
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        n_latents=256, channels=64, width=32, heads=2, hidden=256, n_generated=1, decoder_width=16
    )
    write_latents(tmp_path, autoencoder.eval(), small_clip(), four_latents((256, 64)))
    overrides = ["precision=no", "batch_size=2"]
    config = load_config(DenoiserRun, "small", "denoiser", overrides=overrides, values={"data": str(tmp_path)})
    stage, loss_B, moved = first_step(config)
    assert 30e6 < sum(p.numel() for p in stage.model.parameters()) < 60e6
    # A new model predicts zero, so the loss is the velocity's power: unit noise and unit latents.
    assert loss_B.tolist() == pytest.approx([2, 2], rel=0.05)
    assert moved > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes of matrix products, beside other tests
def test_shap_e_denoiser_takes_its_first_step_at_full_size(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "projection_dim": 768, "vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 299}
    clip = TransformersConditioner(text_config=text, tokenizer_json=small_clip().config.tokenizer_json).eval()
    autoencoder = Autoencoder(
        n_latents=1024, channels=1024, width=32, heads=2, hidden=256, n_generated=4, decoder_width=16
    )
    latents = four_latents((1024, 1024))
    write_latents(tmp_path, autoencoder.eval(), clip, latents, image=False)
    overrides = ["precision=no", "batch_size=1"]
    config = load_config(DenoiserRun, "shap-e", "denoiser", overrides=overrides, values={"data": str(tmp_path)})
    assert config.gradient_checkpointing
    stage, loss_B, moved = first_step(config)
    assert sum(p.numel() for p in stage.model.parameters()) == 315_692_032  # of the released text300M
    powers = np.square(latents.astype(np.float64)).mean((1, 2))
    assert np.abs(powers - float(loss_B[0])).min() < 1e-5  # a new model predicts zero
    assert stage.model.gradient_checkpointing and moved > 0
