"""Reading transformers' CLIPs as evaluators: their own folders (CLIP, SigLIP), and our conditioners made of them.

Shapes: N texts or pictures, T tokens, S image size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from ...checkpoints.folders import refuse_pickles
from ...checkpoints.plain_weights import read_weights
from ...errors import UserError
from ...files import read_json
from ...models.hashing import weights_hash
from ...models.transformers_clip import TransformersConditioner
from .clip import (
    ClipEvaluator,
    Preparation,
    Tensors,
    Words,
    embedding_hash,
    factor,
    file_words,
    fill,
    first_line,
    tokenizer_identity,
    tower_hash,
)
from .facts import EvaluatorFacts, transformers_architecture
from .files import CONFIG, WEIGHTS, Found, quick_gelu_mistake, told_pretraining

__all__ = ["from_transformers_conditioner", "from_transformers_folder"]

RESAMPLES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in transformers' configs


def from_transformers_folder(name: str, found: Found) -> ClipEvaluator:
    folder = found.path
    refuse_pickles(folder)
    raw = read_json(folder / CONFIG, "CLIP config")
    is_clip = raw["model_type"] == "clip"
    try:
        model = CLIPModel(CLIPConfig.from_dict(raw)) if is_clip else SiglipModel(SiglipConfig.from_dict(raw))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise UserError(f"{folder}: its config or tokenizer cannot be read ({first_line(error)})") from None
    fill(model, _shards(folder), str(folder), CONFIG)
    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    # SigLIP was trained to attend to its padding.
    names = ("input_ids", "attention_mask") if is_clip else ("input_ids",)

    def tokens(texts: list[str]) -> Tensors:
        context = text["max_position_embeddings"]
        every = tokenizer(texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        return {name: every[name] for name in names}

    return _of_transformers(
        name,
        found,
        model,
        (text, vision),
        _processor(folder, vision["image_size"]),
        Words(tokens, lambda text: len(tokenizer(text, verbose=False).input_ids), tokenizer_identity(tokenizer)),
        told_pretraining((*found.hints, str(raw.get("_name_or_path", "")))),
        weights=weights_hash(_as_conditioner(model) if is_clip else model),
        towers=(model.vision_model, model.text_model),
        encode_text=lambda **tokens: _pooled(model.get_text_features(**tokens)),
        encode_image=lambda pixels_N3SS: _pooled(model.get_image_features(pixel_values=pixels_N3SS)),
    )


def from_transformers_conditioner(
    name: str, found: Found, model: TransformersConditioner, tag: str | None
) -> ClipEvaluator:
    """A conditioner of ours; without a tower, or the image tower's projection, it must not score."""
    config = model.config
    mean, std = tuple(config.mean or [0.5] * 3), tuple(config.std or [0.5] * 3)
    text: Any = model.text
    vision: Any = model.vision
    if text is None:
        words = Words(lambda texts: {}, len, None)
    else:
        words = file_words(config.tokenizer_json, text.config.max_position_embeddings)
    towers = [getattr(vision, "vision_model", vision), getattr(text, "text_model", text)]
    lacks = "texts" if text is None else "" if vision is not None and config.vision_projection else "pictures"
    return _of_transformers(
        name,
        found,
        model,
        (config.text_config, config.vision_config),
        Preparation(model.image_size if vision is not None else 0, mean, std),
        words,
        tag,
        weights=model.weights_hash,
        towers=[tower for tower in towers if tower is not None],
        encode_text=lambda ids_NT: text(input_ids=ids_NT).text_embeds,
        encode_image=lambda pixels_N3SS: vision(pixel_values=pixels_N3SS).image_embeds,
        mistake=f"it embeds no {lacks}, so it cannot score" if lacks else None,
    )


def _of_transformers(
    name: str,
    found: Found,
    model: nn.Module,
    configs: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
    preparation: Preparation,
    words: Words,
    tag: str | None,
    *,
    weights: str,
    towers: Sequence[nn.Module],
    encode_text: Callable[..., torch.Tensor],
    encode_image: Callable[[torch.Tensor], torch.Tensor],
    mistake: str | None = None,
) -> ClipEvaluator:
    """configs: of the text and the image tower; None for one that is not there."""
    text, vision = configs
    quick = {config["hidden_act"] == "quick_gelu" for config in configs if config is not None}
    if mistake is None and len(quick) == 1:
        setting = f'"hidden_act": "{"gelu" if True in quick else "quick_gelu"}"'
        mistake = quick_gelu_mistake(None, tag, has_quick_gelu=True in quick, setting=setting)
    scale = getattr(model, "logit_scale", None)
    facts = EvaluatorFacts(
        name=name,
        source=found.source,
        hash=embedding_hash(weights, [_settings(config) for config in configs], preparation, words),
        weights=weights,
        family="ours" if found.layout == "ours" else "transformers",
        architecture=transformers_architecture(text, vision),
        pretraining=tag,
        image_size=preparation.size,
        context_length=text["max_position_embeddings"] if text is not None else 0,
        mean=preparation.mean,
        std=preparation.std,
        quick_gelu=True in quick if len(quick) == 1 else None,
        logit_scale=None if scale is None else factor(scale),
        towers=tuple(tower_hash(tower.state_dict()) for tower in towers),
    )
    return ClipEvaluator(facts, model, preparation, words, encode_text, encode_image, mistake)


def _settings(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What changes a tower's features and is not seen in its tensors."""
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id", "max_position_embeddings")
    return None if config is None else {name: config.get(name) for name in names}


def _as_conditioner(model: CLIPModel) -> nn.Module:
    """The tensors under the names they have in a `TransformersConditioner`."""
    whole, text, vision = nn.Module(), nn.Module(), nn.Module()
    text.text_model, text.text_projection = model.text_model, model.text_projection
    vision.vision_model, vision.visual_projection = model.vision_model, model.visual_projection
    whole.text, whole.vision = text, vision
    return whole


def _shards(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of transformers, in one file or several."""
    index = folder / f"{WEIGHTS}.index.json"
    names = {WEIGHTS}
    if index.is_file():
        names = set(read_json(index, "list of weights").get("weight_map", {}).values())
    state: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        state |= read_weights(folder / name)
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}  # of old releases


def _processor(folder: Path, size: int) -> Preparation:
    """From the settings of transformers' picture processor, alone or within the processor's."""
    alone, within = folder / "preprocessor_config.json", folder / "processor_config.json"
    if alone.is_file():
        settings = read_json(alone, "picture settings")
    elif within.is_file():
        settings = read_json(within, "picture settings").get("image_processor", {})
    else:
        raise UserError(
            f"{folder} has no {alone.name}, so that how its pictures are prepared is not known: put it there"
        )
    edges = settings.get("size") or {}
    edge = edges if isinstance(edges, int) else edges.get("shortest_edge", edges.get("height"))
    usual = settings.get("do_normalize", True) and settings.get("resample", 3) in RESAMPLES
    if edge != size or not usual or "image_mean" not in settings or "image_std" not in settings:
        raise UserError(
            f"{folder}: its pictures are prepared in an unusual way (they are to be resized to its {size} pixels, by "
            f"bilinear or bicubic filters, and normalised), so its scores would not be its own"
        )
    mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    return Preparation(size, mean, std, RESAMPLES[settings.get("resample", 3)])


def _pooled(features: Any) -> torch.Tensor:
    """transformers 5 gives all outputs of the tower, 4 gave the features themselves."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output
