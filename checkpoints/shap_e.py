"""OpenAI's released weights, or diffusers' folders of them, as one of our pipeline folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..errors import UserError
from ..files import read_json
from ..models import autoencoder as autoencoders
from ..models import denoiser as denoisers
from ..models.autoencoder import Autoencoder
from ..models.conditioner import Conditioner
from ..models.denoiser import Denoiser
from ..models.guidance import shap_e_scheduler
from ..models.hashing import weights_hash
from ..models.pipeline import ShapeloomPipeline
from ..models.transformers_clip import TransformersConditioner
from .clip import load_clip
from .pipeline import publish_pipeline
from .plain_weights import read_weights
from .shap_e_keys import (
    Row,
    Tensors,
    diffusers_prior_rows,
    diffusers_renderer_rows,
    released_decoder_rows,
    released_denoiser_rows,
    released_encoder_rows,
)
from .transformers_folders import load_transformers_clip

__all__ = ["import_shap_e"]

Kind = Literal["text", "image"]
HEADS = {"text": 16, "image": 8}  # of the released denoisers; the encoder has 8
ENCODER_HEADS = 8
DEFAULT_CLIP = "ViT-L-14-quickgelu/openai"
DIFFUSERS = {"ShapEPipeline": "text", "ShapEImg2ImgPipeline": "image"}
# Tensors that are no weights: placeholders of generated matrices, constants, statistics that nothing reads.
NO_WEIGHTS = re.compile(
    r"(renderer\.nerstf|^mlp)\.mlp\.[0-3]\.weight$|void\.background$|^mesh_decoder\.|^clip_(mean|std)$"
)


def import_shap_e(source: Path, out: Path, *, kind: str | None = None, clip: str | None = None) -> str:
    """Write the pipeline folder `out` from released `.pt` files or a diffusers pipeline folder.

    Args:
        source: a folder with the released denoiser (text_cond.pt or image_cond.pt) and the transmitter or decoder
            (files are known by what is in them, not by their names), or a diffusers ShapE(Img2Img)Pipeline folder.
        kind: text or image; needed only where the folder has both denoisers.
        clip: the ViT-L/14 beside released files: a folder of transformers or open_clip, or open_clip's NAME/PRETRAINED.
            A diffusers folder has its own.
    Returns: what was imported, for the user.
    Raises: UserError for files that are missing, cut short, hold code, or are of another architecture.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder" if source.exists() else f"{source} does not exist")
    if kind not in (None, "text", "image"):
        raise UserError(f"--condition must be text or image, got {kind}")
    parts = _from_diffusers(source, clip) if (source / "model_index.json").is_file() else _from_release(source, kind)
    conditioner = parts.conditioner or _clip_of(clip or DEFAULT_CLIP)
    _check_conditioner(parts.denoiser, conditioner)
    hashes = {
        "autoencoder_hash": weights_hash(parts.autoencoder),
        "conditioner_hash": conditioner.weights_hash,
    }
    parts.denoiser.register_to_config(**hashes)
    publish_pipeline(ShapeloomPipeline(parts.autoencoder, parts.denoiser, conditioner, shap_e_scheduler()), out)
    count = sum(p.numel() for model in (parts.autoencoder, parts.denoiser) for p in model.parameters())
    encoder = "with its encoder" if parts.autoencoder.encoder is not None else "without an encoder: it cannot encode"
    kind = "text" if parts.denoiser.takes("text") else "image"
    return f"{out}: {kind}-conditioned Shap-E, {count / 1e6:.1f} M parameters, {encoder}"


@dataclass
class Parts:
    autoencoder: Autoencoder
    denoiser: Denoiser
    conditioner: Conditioner | TransformersConditioner | None = None


# --- the two kinds of source -----------------------------------------------------------------------------------------


def _from_release(source: Path, kind: str | None) -> Parts:
    found: dict[str, tuple[Path, Tensors]] = {}
    paths = sorted(path for path in source.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".safetensors"))
    if not paths:
        raise UserError(f"{source} has neither a model_index.json (diffusers) nor .pt files (OpenAI's release)")
    for path in paths:
        state = read_weights(path)
        found[_what(path, state)] = (path, state)
    kinds = [name for name in ("text", "image") if name in found and kind in (None, name)]
    if len(kinds) == 2:
        raise UserError(f"{source} has a text and an image denoiser: choose one with --condition text or image")
    decoder = next((name for name in ("transmitter", "decoder") if name in found), None)
    if not kinds or decoder is None:
        lacking = f"no {kind or 'text or image'} denoiser" if not kinds else "no transmitter and no decoder"
        raise UserError(f"{source} has {lacking}; it holds {', '.join(sorted(found))}")
    denoiser_path, denoiser_state = found[kinds[0]]
    decoder_path, decoder_state = found[decoder]
    denoiser = _denoiser(kinds[0], denoiser_state, str(denoiser_path), HEADS[kinds[0]], released=True)
    return Parts(_autoencoder(decoder_state, str(decoder_path), released=True), denoiser)


def _from_diffusers(source: Path, clip: str | None) -> Parts:
    name = read_json(source / "model_index.json", "pipeline index").get("_class_name")
    if name not in DIFFUSERS:
        raise UserError(f"{source} holds a {name}, not one of {', '.join(DIFFUSERS)}")
    kind = DIFFUSERS[name]
    heads = read_json(source / "prior" / "config.json", "prior settings").get("num_attention_heads")
    if not isinstance(heads, int):
        raise UserError(f"{source}/prior/config.json: num_attention_heads is missing")
    prior, renderer = _weights_in(source / "prior"), _weights_in(source / "shap_e_renderer")
    return Parts(
        _autoencoder(read_weights(renderer), str(renderer), released=False),
        _denoiser(kind, read_weights(prior), str(prior), heads, released=False),
        _clip_of(clip) if clip else load_transformers_clip(source),
    )


def _weights_in(folder: Path) -> Path:
    for suffix in ("safetensors", "bin"):
        path = folder / f"diffusion_pytorch_model.{suffix}"
        if path.is_file():
            return path
    raise UserError(f"{folder} has no diffusion_pytorch_model.safetensors (or .bin)")


def _clip_of(clip: str) -> Conditioner | TransformersConditioner:
    """A folder of transformers, a folder of open_clip, or an open_clip name."""
    if (Path(clip) / "config.json").is_file() or (Path(clip) / "model_index.json").is_file():
        return load_transformers_clip(Path(clip))
    return load_clip(clip)


def _check_conditioner(denoiser: Denoiser, conditioner: Conditioner | TransformersConditioner) -> None:
    """Refuse a CLIP whose features do not fit the denoiser's projection."""
    if denoiser.takes("text"):
        width, needed, what = conditioner.encode_text(["a"]).pooled.shape[-1], denoiser.config.pooled_width, "text"
    else:
        blank = [Image.new("RGB", (8, 8))]
        width, needed, what = conditioner.encode_image(blank).tokens.shape[-1], denoiser.config.image_width, "image"
    if width != needed:
        raise UserError(
            f"the CLIP's {what} features are {width} wide, the denoiser reads {needed}: name another --clip"
        )


# --- models from tensors ---------------------------------------------------------------------------------------------


def _denoiser(kind: str, state: Tensors, where: str, heads: int, *, released: bool) -> Denoiser:
    layers = _count(state, r"(?:resblocks|transformer_blocks)\.(\d+)\.")
    rows = released_denoiser_rows(kind, layers, heads) if released else diffusers_prior_rows(kind, layers)
    ours = _translate(rows, state, where)
    n_latents, width = ours["positions"].shape
    config: dict[str, Any] = {
        **denoisers.SHAP_E,
        "n_latents": n_latents,
        "channels": ours["latent_in.weight"].shape[1],
        "width": width,
        "heads": heads,
        "layers": layers,
        "conditions": ["text_pooled"] if kind == "text" else ["image_tokens"],
    }
    if kind == "text":
        config["pooled_width"] = ours["text_pooled.weight"].shape[1]
    else:
        config["image_width"] = ours["image_tokens.1.weight"].shape[1]
    return _fill(Denoiser, config, ours, where)


def _autoencoder(state: Tensors, where: str, *, released: bool) -> Autoencoder:
    norms = sorted(key for key in state if re.search(r"nerstf__mlp__\d+__weight\.norm\.weight$", key))
    columns = [len(state[key]) for key in norms]
    n_generated = len(columns)
    with_encoder = "encoder.output_tokens" in state
    if not released:
        mlp = state.get(f"mlp.mlp.{n_generated}.weight")
        directions = mlp.shape[1] - mlp.shape[0] if mlp is not None and mlp.ndim == 2 else 0
        rows = diffusers_renderer_rows(n_generated, columns, directions)
    else:
        rows = released_decoder_rows(n_generated, columns, ("encoder." if with_encoder else "") + "params_proj")
    layers = _count(state, r"processor\.resblocks\.(\d+)\.")
    if with_encoder:
        rows = released_encoder_rows(layers, ENCODER_HEADS) + rows
    ours = _translate(rows, state, where)
    hidden, n_features = ours["decoder.rows.0"].shape[:2]
    config: dict[str, Any] = {
        **autoencoders.SHAP_E,
        "n_latents": n_generated * hidden,
        "channels": ours["decoder.rows.0"].shape[2],
        "hidden": hidden,
        "field_frequencies": (n_features // 3 - 1) // 2,
        "n_generated": n_generated,
        "with_encoder": with_encoder,
    }
    if with_encoder:
        config |= {
            "n_latents": len(ours["encoder.queries"]),
            "width": ours["encoder.queries"].shape[1],
            "heads": ENCODER_HEADS,
            "encoder_layers": layers,
            "point_frequencies": (ours["encoder.embed_points.weight"].shape[1] // 6 - 1) // 2,
            "patch_size": ours["encoder.embed_views.patches.weight"].shape[-1],
        }
    return _fill(Autoencoder, config, ours, where)


def _translate(rows: Iterable[Row], state: Tensors, where: str) -> Tensors:
    """Their tensors under our names. Raises UserError that lists what is missing or not known."""
    rows = list(rows)
    wanted = {name for row in rows for name in row.theirs}
    have = {name for name in state if not NO_WEIGHTS.search(name)}
    missing, extra = sorted(wanted - have), sorted(have - wanted)
    if missing or extra:
        raise UserError(f"{where}: {_listed(missing, extra)}; {_nearest(state)}")
    try:
        return {row.ours: row.join(*(state[name] for name in row.theirs)).float().contiguous() for row in rows}
    except RuntimeError as error:
        raise UserError(f"{where}: its tensors do not have Shap-E's shapes ({str(error).splitlines()[0]})") from None


def _fill(cls: Any, config: dict[str, Any], tensors: Tensors, where: str) -> Any:
    """A model of `config` with `tensors` as its weights, nothing else ever allocated."""
    try:
        with torch.device("meta"):
            model = cls(**config)
        wrong = [
            f"{name} is {list(tensors[name].shape)}, expected {list(value.shape)}"
            for name, value in model.state_dict().items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if wrong:
            raise ValueError(wrong[0])
        model.load_state_dict(tensors, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: its tensors do not make a Shap-E model ({reason})") from None
    return model.requires_grad_(True).eval()


# --- telling files apart ---------------------------------------------------------------------------------------------

# A tensor that only this file has.
MARKS = {
    "text": "wrapped.clip_embed.weight",
    "image": "wrapped.clip_embed.1.weight",
    "transmitter": "encoder.output_tokens",
    "decoder": "params_proj.projections.nerstf__mlp__0__weight.proj.weight",
}


def _what(path: Path, state: Tensors) -> str:
    for name, mark in MARKS.items():
        if mark in state:
            return name
    some = ", ".join(sorted(state)[:3])
    raise UserError(f"{path} is of another architecture than Shap-E: it holds {some}, …; {_nearest(state)}")


def _nearest(state: Tensors) -> str:
    """Which of the released models has most keys in common, for the message."""
    columns = [0] * 4
    known: dict[str, Sequence[Row]] = {
        "text300M": released_denoiser_rows("text", 24, 16),
        "image300M": released_denoiser_rows("image", 24, 8),
        "transmitter": released_encoder_rows(11, 8) + released_decoder_rows(4, columns, "encoder.params_proj"),
        "decoder": released_decoder_rows(4, columns, "params_proj"),
        "diffusers' text prior": diffusers_prior_rows("text", 24),
        "diffusers' image prior": diffusers_prior_rows("image", 24),
        "diffusers' renderer": diffusers_renderer_rows(4, columns, 0),
    }
    keys = set(state)

    def likeness(name: str) -> float:
        theirs = {key for row in known[name] for key in row.theirs}
        return len(theirs & keys) / len(theirs | keys)

    best = max(known, key=likeness)
    return f"nearest is {best}, which shares {likeness(best):.0%} of the names"


def _listed(missing: list[str], extra: list[str]) -> str:
    parts = []
    for names, what in ((missing, "missing"), (extra, "not known")):
        if names:
            some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            parts.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {what} ({some})")
    return " and ".join(parts)


def _count(state: Tensors, pattern: str) -> int:
    """Layers are numbered from 0: one more than the highest number."""
    return 1 + max((int(match[1]) for key in state if (match := re.search(pattern, key))), default=-1)
