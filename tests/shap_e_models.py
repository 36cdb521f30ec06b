"""Shap-E pipelines of diffusers with random weights, and the released files that hold the same weights.

The translation to the released names is read from the list beside the keys, not from the code under test.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PriorTransformer, ShapEImg2ImgPipeline, ShapEPipeline
from diffusers.pipelines.shap_e.renderer import ShapERenderer
from open_clip.tokenizer import SimpleTokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from shapeloom.models.decoder import FieldValues, ImplicitField
from shapeloom.models.marching_cubes import case_table

KEYS = Path(__file__).resolve().parent.parent.parent / "shared" / "shap_e_keys"
SMALL = {"hidden": 32, "channels": 24, "width": 64, "layers": 2}
FULL = {"hidden": 256, "channels": 1024, "width": 1024, "layers": 24}
HEADS = {"text": 16, "image": 8}


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, none at a value that would hide it (zero biases, unit gains)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.empty_like(value).normal_(generator=generator)
            if value.ndim < 2:
                value.copy_(("norm" in name and name.endswith("weight")) + 0.1 * noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return module.eval()


def prior(kind: str, sizes: dict, embedding_width: int, seed: int = 0) -> PriorTransformer:
    heads = HEADS[kind]
    return randomised(
        PriorTransformer(
            num_attention_heads=heads,
            attention_head_dim=sizes["width"] // heads,
            num_layers=sizes["layers"],
            embedding_dim=sizes["channels"],
            num_embeddings=4 * sizes["hidden"],
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            embedding_proj_norm_type="layer" if kind == "image" else None,
            encoder_hid_proj_type=None,
            added_emb_type=None,
            time_embed_dim=4 * sizes["width"],
            embedding_proj_dim=embedding_width,
            clip_embed_dim=2 * sizes["channels"],
        ),
        seed,
    )


def renderer(sizes: dict, seed: int = 1) -> ShapERenderer:
    hidden = sizes["hidden"]
    model = ShapERenderer(
        param_shapes=((hidden, 93), *[(hidden, hidden)] * 3), d_latent=sizes["channels"], d_hidden=hidden
    )
    randomised(model, seed)
    with torch.no_grad():
        for projection in model.params_proj.projections.values():
            projection.norm.weight.mul_(hidden**-0.5)
            projection.proj.bias.mul_(hidden**-0.5)
        model.mlp.mlp[-1].weight.mul_(3)  # so that a surface is crossed and densities are seen
    cases, masks = case_table()
    model.mesh_decoder.cases.copy_(cases)
    model.mesh_decoder.masks.copy_(masks)
    return model


class InTheirFrame:
    """A field of ours that is asked for points with z up, as theirs: so lattices and cells are the same ones.

    (At the encoding's highest frequency, 2^14, a last bit of a coordinate moves random weights' vertices by 1e-4.)
    """

    def __init__(self, field: ImplicitField) -> None:
        self.field, self.device = field, field.device

    def __len__(self) -> int:
        return len(self.field)

    def __getitem__(self, item: int) -> InTheirFrame:
        return InTheirFrame(self.field[item])

    def __call__(self, points: torch.Tensor) -> FieldValues:
        x, y, z = points.unbind(-1)
        return self.field(torch.stack([x, z, -y], dim=-1))


def scheduler() -> HeunDiscreteScheduler:
    """As published with diffusers' Shap-E."""
    return HeunDiscreteScheduler(
        num_train_timesteps=1024,
        beta_schedule="exp",
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
    )


def tokenizer() -> CLIPTokenizer:
    """CLIP's own words."""
    words = SimpleTokenizer()
    start, end = "<start_of_text>", "<end_of_text>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "model_max_length": 77}
    return CLIPTokenizer(vocab=dict(words.encoder), merges=list(words.bpe_ranks), **special)


def pipeline(kind: str, sizes: dict = SMALL) -> ShapEPipeline | ShapEImg2ImgPipeline:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "text":
        ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
        text = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=768, **ids, **shape)).eval()
        made = ShapEPipeline(prior(kind, sizes, 768), text, tokenizer(), scheduler(), renderer(sizes))
    else:
        vision = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).eval()
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        made = ShapEImg2ImgPipeline(prior(kind, sizes, 32), vision, processor, scheduler(), renderer(sizes))
    made.set_progress_bar_config(disable=True)
    return made


def released(kind: str, theirs: ShapEPipeline | ShapEImg2ImgPipeline) -> tuple[dict, dict]:
    """The denoiser and the decoder under the released names (no encoder)."""
    path = KEYS / "map_original_to_diffusers.json"
    if not path.is_file():
        pytest.skip(f"no list of Shap-E's keys at {path}")
    names = json.loads(path.read_text())
    state, heads = theirs.prior.state_dict(), HEADS[kind]
    denoiser: dict[str, torch.Tensor] = {}
    per_head: dict[str, list] = {}
    for row in names[f"{kind}300M"]:
        if row["original"] is None or row["diffusers"] not in state:
            continue
        value = state[row["diffusers"]]
        if row["op"] == "copy":
            denoiser[row["original"]] = value
        elif "leading axis" in row["op"]:
            denoiser[row["original"]] = value[0]
        else:
            place = int(re.search(r"take \[:, (\d)\]", row["op"])[1])
            per_head.setdefault(row["original"], [None] * 3)[place] = value.unflatten(0, (heads, -1))
    denoiser |= {name: torch.stack(parts, dim=1).flatten(0, 2) for name, parts in per_head.items()}
    rendered = theirs.shap_e_renderer.state_dict()
    decoder = {
        row["original"].removeprefix("encoder."): rendered[row["diffusers"]]
        for row in names["transmitter->ShapERenderer"]
        if row["original"]
    }
    return denoiser, decoder
