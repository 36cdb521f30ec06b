"""`shapeloom export diffusers`: a pipeline of Shap-E's architecture as a folder that diffusers' own pipelines load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import HeunDiscreteScheduler, PriorTransformer, ShapEImg2ImgPipeline, ShapEPipeline
from diffusers.pipelines.shap_e.renderer import ShapERenderer
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, CLIPTokenizer

from ..errors import UserError
from ..files import atomic_folder
from ..models import autoencoder as autoencoders
from ..models import denoiser as denoisers
from ..models.autoencoder import Autoencoder
from ..models.denoiser import Denoiser
from ..models.marching_cubes import case_table
from ..models.pipeline import ShapeloomPipeline
from ..models.transformers_clip import TransformersConditioner
from .shap_e_keys import Tensors, diffusers_prior_rows, diffusers_renderer_rows, export

__all__ = ["export_diffusers", "to_prior", "to_renderer"]

DIRECTIONS = 51  # columns of the viewing direction in the release's field: always multiplied by zero
# Settings that Shap-E's architecture leaves free; every other one must be as released.
FREE_DENOISER = ("n_latents", "channels", "width", "heads", "layers")
FREE_DECODER = ("n_latents", "channels", "hidden")
DECODER = ("decoder_width", "decoder_layers", "row_norm", "field", "field_frequencies", "n_generated", "n_shared")


def export_diffusers(pipeline: ShapeloomPipeline, out: Path) -> str:
    """Write `out` as a ShapEPipeline (text) or ShapEImg2ImgPipeline (image) folder. Returns its class's name.

    Raises: UserError if a part is not of the architecture that diffusers' classes are, naming the first setting.
    """
    kind = "text" if pipeline.denoiser.takes("text") else "image"
    prior, renderer = to_prior(pipeline.denoiser), to_renderer(pipeline.autoencoder)
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, HeunDiscreteScheduler):
        raise UserError(f"diffusers' Shap-E samples with HeunDiscreteScheduler, this pipeline with {type(scheduler)}")
    clip = pipeline.conditioner
    if not isinstance(clip, TransformersConditioner):
        raise UserError(
            "diffusers' Shap-E carries a CLIP of transformers, this pipeline one of open_clip: import the weights "
            "again with --clip naming a folder of transformers"
        )
    if kind == "text":
        result: Any = ShapEPipeline(prior, clip.text, _tokenizer(clip), scheduler, renderer)
    else:
        result = ShapEImg2ImgPipeline(prior, clip.vision, _processor(clip), scheduler, renderer)
    with atomic_folder(out) as aside:
        result.save_pretrained(aside)
    return type(result).__name__


def to_prior(denoiser: Denoiser) -> PriorTransformer:
    """diffusers' class with the same weights. Raises UserError if the architecture is not Shap-E's."""
    config = denoiser.config
    kind = "text" if denoiser.takes("text") else "image"
    _refuse_unlike(config, denoisers.SHAP_E, [k for k in denoisers.SHAP_E if k not in FREE_DENOISER], "denoiser")
    if list(config.conditions) != (["text_pooled"] if kind == "text" else ["image_tokens"]):
        raise UserError(
            f"the denoiser reads {', '.join(config.conditions)}; diffusers' has text_pooled or image_tokens"
        )
    if config.latent_mean is not None:
        raise UserError("the denoiser's latents are standardised, which diffusers' Shap-E does not undo")
    prior = PriorTransformer(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        num_layers=config.layers,
        embedding_dim=config.channels,
        num_embeddings=config.n_latents,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        embedding_proj_norm_type="layer" if kind == "image" else None,
        encoder_hid_proj_type=None,
        added_emb_type=None,
        time_embed_dim=4 * config.width,
        embedding_proj_dim=config.pooled_width if kind == "text" else config.image_width,
        clip_embed_dim=2 * config.channels,
    )
    rows = diffusers_prior_rows(kind, config.layers)
    _load(prior, export(rows, dict(denoiser.state_dict())), {"clip_mean", "clip_std"})
    return prior.eval()


def to_renderer(autoencoder: Autoencoder) -> ShapERenderer:
    """diffusers' class with the decoder's weights and our marching-cubes table, on its white background."""
    config = autoencoder.config
    _refuse_unlike(config, autoencoders.SHAP_E, [k for k in DECODER if k not in FREE_DECODER], "autoencoder")
    shapes = autoencoder.decoder.head.shapes
    if autoencoder.decoder.rows_per_token != 1:
        raise UserError("the autoencoder makes several rows from a latent token, diffusers' Shap-E one from each")
    renderer = ShapERenderer(
        param_names=tuple(f"nerstf.mlp.{i}.weight" for i in range(len(shapes))),
        param_shapes=tuple(shapes),
        d_latent=config.channels,
        d_hidden=config.hidden,
    )
    rows = diffusers_renderer_rows(len(shapes), [columns for _, columns in shapes], DIRECTIONS)
    cases, masks = case_table()
    tensors = export(rows, dict(autoencoder.state_dict()))
    tensors |= {"mesh_decoder.cases": cases, "mesh_decoder.masks": masks}
    generated = {f"mlp.mlp.{i}.weight" for i in range(len(shapes))}
    _load(renderer, tensors, {"void.background", *generated})
    return renderer.eval()


def _load(module: torch.nn.Module, tensors: Tensors, without: set[str]) -> None:
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert set(missing) == without and not unexpected, (missing, unexpected)


def _refuse_unlike(config: Any, released: dict[str, Any], names: list[str], what: str) -> None:
    for name in names:
        if config[name] != released[name]:
            raise UserError(
                f"diffusers' Shap-E classes are of one architecture: the {what}'s {name} is {config[name]}, "
                f"there it is {released[name]}"
            )


def _tokenizer(clip: TransformersConditioner) -> CLIPTokenizer:
    length = clip.config.text_config["max_position_embeddings"]
    tokenizer = Tokenizer.from_str(clip.config.tokenizer_json)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ends = {name: next((s for s in special if name in s), None) for name in ("start", "end")}
    return CLIPTokenizer(
        tokenizer_object=tokenizer,
        model_max_length=length,
        bos_token=ends["start"],
        eos_token=ends["end"],
        unk_token=ends["end"],
        pad_token=ends["end"],
    )


def _processor(clip: TransformersConditioner) -> CLIPImageProcessor:
    size = clip.image_size
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=clip.config.mean,
        image_std=clip.config.std,
    )
