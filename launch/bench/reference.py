"""What the benchmarks and the parity tests compare with: diffusers' Shap-E classes holding the same weights.

The field to measure on is `chair_field.safetensors` (Shap-E's layer shapes fitted to an analytic chair), so that there
is empty space and a surface; $SHAPELOOM_CHAIR names it, else it lies in shared/shap_e_keys beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers.pipelines.shap_e.renderer import ShapERenderer
from safetensors.torch import load_file

from ...errors import UserError
from ...models.decoder import FieldHead, ImplicitField

__all__ = ["CHAIR", "chair_field", "diffusers_renderer"]

CHAIR = Path(
    os.environ.get("SHAPELOOM_CHAIR")
    or Path(__file__).resolve().parents[3] / "shared" / "shap_e_keys" / "chair_field.safetensors"
)


def chair_field(path: Path = CHAIR) -> ImplicitField:
    """One asset: layers 0 to 3 as generated matrices, the rest as the head's own. Raises UserError without the file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the field to measure on in SHAPELOOM_CHAIR")
    stored = load_file(path)
    head = FieldHead(
        kind="nerstf",
        hidden=256,
        n_frequencies=15,
        n_generated=4,
        n_shared=2,
        generated_bias=False,
        density_scale=0.02,
    )
    with torch.no_grad():
        for i, bias in enumerate(head.biases):
            bias.copy_(stored[f"mlp.{i}.bias"])
        for layer, i in zip(head.out[::2], (4, 5, 6), strict=True):
            layer.weight.copy_(stored[f"mlp.{i}.weight"][:, :256])  # the rest are directions, which are always zero
            layer.bias.copy_(stored[f"mlp.{i}.bias"])
        head.out[-1].weight[0] *= -1  # Shap-E's distance is positive inside
        head.out[-1].bias[0] *= -1
    head.requires_grad_(False).eval()
    return ImplicitField(head, [stored[f"mlp.{i}.weight"][None] for i in range(4)])


def diffusers_renderer(field: ImplicitField) -> ShapERenderer:
    """diffusers' renderer with the first asset of `field` in its MLP, on black as the release.

    Its projection is left out, so that only rendering is compared: `decode_to_*` take any latent.
    """
    renderer = ShapERenderer(param_names=(), param_shapes=(), background=(0.0, 0.0, 0.0))
    with torch.no_grad():
        layers = renderer.mlp.mlp
        for i in range(4):
            layers[i].weight.copy_(field.weights[i][0])
            layers[i].bias.copy_(field.head.biases[i])
        for layer, ours in zip(layers[4:], field.head.out[::2], strict=True):
            layer.weight.zero_()
            layer.weight[:, :256] = ours.weight
            layer.bias.copy_(ours.bias)
        layers[6].weight[0] *= -1
        layers[6].bias[0] *= -1
    return renderer.eval()
