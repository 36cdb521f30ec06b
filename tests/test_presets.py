"""The presets of a GPU at their real size, for one step on a CPU."""

import numpy as np
import pytest
import torch
from latent_folders import four_latents, small_clip, write_latents

from shapeloom.config import load_config
from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.transformers_clip import TransformersConditioner
from shapeloom.training.denoiser import DenoiserRun, build
from shapeloom.training.ema import Ema
from shapeloom.training.loop import Stage, checkpoint_gradients, make_optimiser


def first_step(config: DenoiserRun) -> tuple[Stage, torch.Tensor, float]:
    """Build, forward, backward, update, average: the stage, the losses [B], and how far the average moved."""
    stage = build(config)
    ema = Ema(stage.model, config.ema_decay)
    if config.gradient_checkpointing:
        checkpoint_gradients(stage)
    optimiser = make_optimiser(config, stage.model)
    loss_B, _ = stage.loss(stage.model, stage.batches(0, 1).batch(0))
    loss_B.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in stage.model.parameters())
    optimiser.step()
    ema.update(stage.model, 1)
    return stage, loss_B.detach(), float(ema.module.latent_out.weight.abs().max())


def test_small_takes_its_first_step(tmp_path):
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
def test_shap_e_takes_its_first_step_at_full_size(tmp_path):
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
