"""Parameters left frozen by patterns on their names: in a whole model, and in one with adapters."""

from __future__ import annotations

import pytest
import torch

from shapeloom.errors import UserError
from shapeloom.models.denoiser import Condition, Denoiser
from shapeloom.training.finetune import LoraConfig, add_lora, freeze, merged

SIZES = {"n_latents": 16, "channels": 8, "width": 48, "heads": 2, "layers": 3}
WIDTHS = {"text_width": 32, "image_width": 256, "pooled_width": 24}


def model() -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(**SIZES, **WIDTHS)
    torch.nn.init.normal_(denoiser.latent_out.weight, std=0.02)
    return denoiser


def frozen(denoiser: Denoiser) -> set[str]:
    return {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad}


def output(denoiser: Denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    yes = torch.ones(2, dtype=torch.bool)
    text = {"text_tokens": draw(3, 32), "text_mask": yes[:, None].expand(2, 3), "text_pooled": draw(24)}
    image = {"image_tokens": draw(4, 256), "image_pooled": draw(24)}
    return denoiser(draw(16, 8), torch.tensor([0.2, 0.7]), Condition(**text, **image, has_text=yes, has_image=yes))


def test_a_pattern_is_of_a_parameter_or_of_a_layer_above_it():
    every = [name for name, _ in model().named_parameters()]
    for patterns, wanted in (
        (["positions"], {"positions"}),
        (["blocks.[01]"], {name for name in every if name.startswith(("blocks.0.", "blocks.1."))}),
        (["blocks.*.attention"], {name for name in every if ".attention." in name}),
        (["*.bias", "nulls"], {name for name in every if name.endswith(".bias") or name.startswith("nulls.")}),
        ([], set()),
    ):
        denoiser = model()
        freeze(denoiser, patterns)
        assert frozen(denoiser) == wanted and (wanted or not patterns)


def test_a_step_moves_what_is_not_frozen_and_nothing_else():
    denoiser = model()
    freeze(denoiser, ["blocks.0", "*.norm_?.*"])
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    output(denoiser).square().mean().backward()
    optimiser.step()
    moved = {name for name, value in denoiser.state_dict().items() if not torch.equal(value, before[name])}
    still = frozen(denoiser)
    assert still and not moved & still
    assert {"blocks.1.mlp.0.weight", "latent_out.weight", "positions"} <= moved


def test_adapters_of_a_frozen_layer_are_frozen_with_it():
    denoiser = model()
    add_lora(denoiser, LoraConfig(rank=2, train=("positions",)))
    freeze(denoiser, ["blocks.0", "blocks.2.attention.query.weight", "blocks.1.mlp.2"])
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert "positions" in trained
    assert not any(name.startswith(("blocks.0.", "blocks.1.mlp.2.")) for name in trained)
    # A weight's own name leaves its layer's adapters alone: they are other parameters.
    assert {"blocks.1.mlp.0.lora_A.default.weight", "blocks.2.attention.query.lora_B.default.weight"} <= trained
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name in trained:
                parameter.normal_(std=0.1)
        expected = output(denoiser)
        torch.testing.assert_close(output(merged(denoiser)), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(expected, output(model()), atol=1e-3)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("block.*", "blocks"), ("blocks.7", "blocks.0"), ("positons", "positions"), ("*.attention.qury.*", "query")],
)
def test_a_pattern_of_nothing_is_refused(pattern, near):
    with pytest.raises(
        UserError, match=f"^freeze: no parameter or layer is called '.*'; the nearest are .*{near}"
    ) as refused:
        freeze(model(), ["positions", pattern])
    assert f"'{pattern}'" in str(refused.value) and len(str(refused.value)) < 300
