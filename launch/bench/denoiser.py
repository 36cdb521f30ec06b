"""The 300 M denoiser's forward pass with a guidance batch of 2: ours against diffusers' PriorTransformer, same weights.

    python -m shapeloom.launch.bench.denoiser [--layers 24] [--repeat 3]

Cost model: 24 layers of width 1,024 over 2 x 1,026 tokens are 24·12·1024²·2052 = 620 G multiply-adds in matrices and
24·2·2·1026²·1024 = 103 G in attention: 1.45 TFLOP. Attention is the same fused kernel in both programs; products are
oneDNN's here and MKL's there (models/linear.py), which on AMD's processors is most of the difference. The rest is
activations in the same pass, norms, copies, the variance half of the output.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from ...checkpoints.diffusers_export import to_prior
from ...models.denoiser import SHAP_E, Condition, Denoiser
from .measure import finish, interleaved


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("making the published denoiser with random weights", flush=True)
    sizes = {**SHAP_E, "layers": options.layers}
    model = Denoiser(**sizes, heads=16, conditions=["text_pooled"], pooled_width=768).eval()
    torch.nn.init.normal_(model.latent_out.weight, std=0.03)  # it starts at zero, which would compare nothing
    prior = to_prior(model)
    pooled_BP = F.normalize(torch.randn(2, 768), dim=-1)
    x_BLC, level_B, nothing = torch.randn(2, 1024, 1024), torch.full((2,), 0.5), torch.zeros(2, 1, 1)
    condition = Condition(
        text_tokens=nothing,
        text_mask=torch.ones(2, 1, dtype=torch.bool),
        text_pooled=pooled_BP,
        has_text=torch.tensor([False, True]),
        image_tokens=nothing,
        image_pooled=pooled_BP,
        has_image=torch.tensor([False, False]),
    )
    theirs_condition = torch.stack([torch.zeros(768), pooled_BP[1]]) * 768**0.5

    def ours() -> torch.Tensor:
        return model(x_BLC, level_B, condition)

    def theirs() -> torch.Tensor:
        return prior(x_BLC, timestep=512, proj_embedding=theirs_condition).predicted_image_embedding

    print("warming up", flush=True)
    difference = float((ours() - theirs()[..., :1024]).abs().max())
    print(f"measuring {options.repeat} rounds", flush=True)
    seconds = interleaved({"ours": ours, "diffusers": theirs}, options.repeat)
    flop = options.layers * (2 * 12 * 1024**2 * 2052 + 2 * 2 * 2 * 1026**2 * 1024)
    finish(
        {
            "bench": "denoiser",
            "layers": options.layers,
            "ours_s": seconds["ours"],
            "diffusers_s": seconds["diffusers"],
            "ratio": seconds["diffusers"] / seconds["ours"],
            "ours_gflops": flop / seconds["ours"] / 1e9,
            "largest_difference": difference,
        }
    )


if __name__ == "__main__":
    main()
