"""A whole sampling run of the published 300 M denoiser: ours and diffusers' classes, same weights, same noise.

    python -m shapeloom.launch.bench.parity [--steps 64] [--guidance 15]

No published weights are needed: they are random, of the published shapes. 64 Heun steps are 127 calls with a guidance
batch of 2, 1.45 TFLOP each (see bench/denoiser.py), by either program: 40 minutes on one fast core.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

from ...checkpoints.diffusers_export import to_prior
from ...models.conditioner import TextFeatures
from ...models.denoiser import SHAP_E, Denoiser
from ...models.guidance import guided, sample_latents, shap_e_scheduler
from ...models.pipeline import condition_from
from ...progress import Bar
from .measure import finish


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=15.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Denoiser(**SHAP_E, heads=16, conditions=["text_pooled"], pooled_width=768).eval()
    torch.nn.init.normal_(model.latent_out.weight, std=1024**-0.5)  # it starts at zero, which would compare nothing
    prior = to_prior(model)
    pooled_1P, noise_1LC = F.normalize(torch.randn(1, 768), dim=-1), torch.randn(1, 1024, 1024)
    n_calls = 2 * options.steps - 1

    began = time.perf_counter()
    features = TextFeatures(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), pooled_1P)
    predict = guided(model, condition_from(features, None, model), text_scale=options.guidance, image_scale=1.0)
    with Bar(n_calls, "ours") as bar:
        ours = sample_latents(
            predict, noise_1LC, shap_e_scheduler(), steps=options.steps, on_step=lambda _: bar.update(1)
        )
    ours_s = time.perf_counter() - began

    began = time.perf_counter()
    scheduler = shap_e_scheduler()
    scheduler.set_timesteps(options.steps)
    x_1LC = noise_1LC * scheduler.init_noise_sigma
    embedding_2P = torch.cat([torch.zeros_like(pooled_1P), pooled_1P]) * 768**0.5
    with Bar(n_calls, "diffusers") as bar:
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([x_1LC, x_1LC]), t)
            out = prior(scaled, timestep=t, proj_embedding=embedding_2P).predicted_image_embedding
            empty, text = out[..., :1024].chunk(2)
            x_1LC = scheduler.step(empty + options.guidance * (text - empty), t, x_1LC).prev_sample
            bar.update(1)
    theirs_s = time.perf_counter() - began
    finish(
        {
            "bench": "parity",
            "steps": options.steps,
            "calls": n_calls,
            "guidance": options.guidance,
            "relative_difference": float((ours - x_1LC).norm() / x_1LC.norm()),
            "latents_std": float(x_1LC.std()),
            "ours_s": ours_s,
            "diffusers_s": theirs_s,
        }
    )


if __name__ == "__main__":
    main()
