"""Reading CLIPs as evaluators: open_clip's, transformers' and our own, from files.

Models are built from their configs and filled from files, never by a name: nothing here can reach the network, but for
a tokenizer that open_clip's config names, where `allow_download` permits it.

Shapes: N texts or pictures, T tokens, S image size.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe
from torch import nn

from ...checkpoints.folders import refuse_pickles
from ...checkpoints.pipeline import load_conditioner
from ...checkpoints.plain_weights import read_weights
from ...errors import UserError
from ...files import read_json, sha256_file
from ...models.hashing import weights_hash
from ...models.transformers_clip import TransformersConditioner
from .clip import (
    TOKENIZER,
    ClipEvaluator,
    Preparation,
    Words,
    embedding_hash,
    factor,
    file_words,
    fill,
    first_line,
    tokenizer_identity,
    tower_hash,
)
from .facts import EvaluatorFacts, open_clip_architecture
from .files import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    Found,
    hub_tokenizer,
    quick_gelu_mistake,
    told_pretraining,
)
from .transformers_towers import from_transformers_conditioner, from_transformers_folder

__all__ = ["conditioner_facts", "load_evaluator"]

CLIP_VOCABULARY = 49408


def load_evaluator(
    name: str, found: Found, *, device: str | None = None, allow_download: bool = False
) -> ClipEvaluator:
    """Read the CLIP that `find` found, in evaluation mode; device None is a GPU where there is one.

    Raises: UserError if it is damaged, does not fit its architecture, or must not score; see `evaluators`.
    """
    evaluator = _read(name, found, allow_download)
    if evaluator.mistake:
        raise UserError(f"{name}: {evaluator.mistake}")
    evaluator.module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return evaluator


def conditioner_facts(name: str, found: Found) -> EvaluatorFacts:
    """Of a pipeline's conditioner, which may have one tower alone. Raises UserError if it is damaged."""
    return _read(name, found, allow_download=False).facts


def _read(name: str, found: Found, allow_download: bool) -> ClipEvaluator:
    readers: dict[str, Callable[[], ClipEvaluator]] = {
        "open_clip": lambda: _open_clip_folder(name, found, allow_download),
        "weights": lambda: _weights_file(name, found, allow_download),
        "transformers": lambda: from_transformers_folder(name, found),
        "ours": lambda: _conditioner_folder(name, found),
    }
    # New models begin with random weights: drawing them must not change what the caller draws afterwards, which
    # would then depend on what a memo knew.
    with torch.random.fork_rng(devices=[]):
        evaluator = readers[found.layout]()
    evaluator.module.eval().requires_grad_(False)
    return evaluator


def _open_clip_folder(name: str, found: Found, allow_download: bool) -> ClipEvaluator:
    folder = found.path
    refuse_pickles(folder)
    config = read_json(folder / CLIP_CONFIG, "CLIP config")
    model_cfg = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict):
        raise UserError(f"{folder / CLIP_CONFIG}: field 'model_cfg' is missing")
    clip = _built(model_cfg, str(folder))
    from_openai = fill(clip, read_weights(folder / CLIP_WEIGHTS), str(folder / CLIP_WEIGHTS), CLIP_CONFIG)
    words = _open_clip_words(model_cfg, folder, allow_download)
    preparation = _open_clip_preparation(config.get("preprocess_cfg") or {}, clip)
    tag = "openai" if from_openai else told_pretraining(found.hints)
    return _of_open_clip(name, found, clip, model_cfg, preparation, words, tag)


def _weights_file(name: str, found: Found, allow_download: bool) -> ClipEvaluator:
    """A file of an architecture that open_clip knows by name."""
    architecture = found.architecture or ""
    model_cfg = open_clip.get_model_config(architecture)
    clip = _built(model_cfg, architecture)
    _refuse_programmes(found.path)
    from_openai = fill(clip, read_weights(found.path), str(found.path), architecture)
    tag = found.pretraining or ("openai" if from_openai else told_pretraining(found.hints))
    words = _open_clip_words(model_cfg, found.path.parent, allow_download)
    preparation = _open_clip_preparation(_published_preparation(architecture, tag), clip)
    return _of_open_clip(name, found, clip, model_cfg, preparation, words, tag, architecture)


def _conditioner_folder(name: str, found: Found) -> ClipEvaluator:
    """A conditioner of ours, of either class."""
    model = load_conditioner(found.path)
    config = model.config
    tag = told_pretraining((*found.hints, config.name))
    if isinstance(model, TransformersConditioner):
        return from_transformers_conditioner(name, found, model, tag)
    preparation = Preparation(model.image_size, tuple(config.mean or [0.5] * 3), tuple(config.std or [0.5] * 3))
    if config.tokenizer_json is None:
        words = _clip_words(model.context_length)
    else:
        words = file_words(config.tokenizer_json, model.context_length)
    return _of_open_clip(name, found, model.clip, config.model_cfg, preparation, words, tag)


def _of_open_clip(
    name: str,
    found: Found,
    clip: nn.Module,
    model_cfg: Mapping[str, Any],
    preparation: Preparation,
    words: Words,
    tag: str | None,
    architecture: str | None = None,
) -> ClipEvaluator:
    has_quick_gelu = bool(model_cfg.get("quick_gelu"))
    setting = "" if architecture else f'"quick_gelu": {str(not has_quick_gelu).lower()}'
    base = architecture or _architecture_name(model_cfg)
    mistake = quick_gelu_mistake(base, tag, has_quick_gelu=has_quick_gelu, setting=setting)
    notes: tuple[str, ...] = ()
    clips_words = model_cfg["text_cfg"].get("vocab_size", CLIP_VOCABULARY) == CLIP_VOCABULARY
    if tag is None and clips_words and not has_quick_gelu:  # those with words of their own are not OpenAI's
        notes = ("runs without QuickGELU, and no name tells whether it was trained so (OpenAI's weights were not)",)
    state = clip.state_dict()
    image = {key: value for key, value in state.items() if key.startswith("visual.")}
    text = {key: value for key, value in state.items() if key not in image and not key.startswith("logit_")}
    weights = weights_hash(clip)
    facts = EvaluatorFacts(
        name=name,
        source=found.source,
        hash=embedding_hash(weights, model_cfg, preparation, words),
        weights=weights,
        family="ours" if found.layout == "ours" else "open_clip",
        architecture=open_clip_architecture(model_cfg),
        pretraining=tag,
        image_size=preparation.size,
        context_length=model_cfg["text_cfg"].get("context_length", 77),
        mean=preparation.mean,
        std=preparation.std,
        quick_gelu=has_quick_gelu,
        logit_scale=factor(clip.logit_scale),
        notes=notes,
        towers=(tower_hash(image), tower_hash(text)),
    )
    return ClipEvaluator(
        facts, clip, preparation, words, lambda ids_NT: clip.encode_text(ids_NT), clip.encode_image, mistake
    )


def _built(model_cfg: Mapping[str, Any], where: str) -> nn.Module:
    """open_clip's model with random weights; what `create_model` builds, without its look-ups."""
    cfg = deepcopy(dict(model_cfg))
    try:
        if "multimodal_cfg" in cfg or cfg["text_cfg"].get("hf_model_name"):
            raise UserError(f"{where}: only CLIPs with open_clip's own text tower can score, so this one cannot")
        if cfg["vision_cfg"].get("timm_model_name"):
            cfg["vision_cfg"]["timm_model_pretrained"] = False
        kind = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
        return kind(**{**cfg, "output_dict": True})
    except UserError:
        raise
    except Exception as error:  # a config of another version, or not of a CLIP
        raise UserError(f"{where}: its config describes no CLIP of open_clip ({first_line(error)})") from None


def _open_clip_preparation(preprocess: Mapping[str, Any], clip: nn.Module) -> Preparation:
    """open_clip's defaults stand for what is not said. How a picture is cropped does not matter to a square."""
    size = clip.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"this CLIP reads pictures of {width} x {height} pixels, and only square ones can be scored")
    return Preparation(
        size=height,
        mean=tuple(preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(preprocess.get("std") or open_clip.OPENAI_DATASET_STD),
        resample="bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic",
    )


def _refuse_programmes(path: Path) -> None:
    """OpenAI published TorchScript, which no restricted reader opens."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.endswith("/constants.pkl") for member in archive.namelist()):
                raise UserError(
                    f"{path} is a TorchScript programme, which is never opened: use its weights as safetensors"
                )


def _published_preparation(architecture: str, tag: str | None) -> Mapping[str, Any]:
    """Of the published weights `tag`, or of all published ones of this architecture if they agree."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    kept = ("mean", "std", "interpolation")
    every = [{key: cfg[key] for key in kept} for t in tags if (cfg := open_clip.get_pretrained_cfg(architecture, t))]
    if tag in tags:
        return every[tags.index(tag)]
    return every[0] if every and all(one == every[0] for one in every) else {}


def _open_clip_words(model_cfg: Mapping[str, Any], folder: Path, allow_download: bool) -> Words:
    """The tokenizer that a config asks for: a file of ours in the folder, one of the hub, or CLIP's."""
    text_cfg = model_cfg["text_cfg"]
    context, file = text_cfg.get("context_length", 77), folder / TOKENIZER
    repository, vocabulary = text_cfg.get("hf_tokenizer_name"), text_cfg.get("vocab_size", CLIP_VOCABULARY)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if repository == file.name or (not repository and vocabulary != CLIP_VOCABULARY):
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}, which a CLIP with {vocabulary} tokens of its own needs")
        return file_words(file.read_text("utf-8"), context)
    if not repository:
        return _clip_words(context, **options)
    home = folder if file.is_file() else hub_tokenizer(repository, allow_download=allow_download)
    mode = text_cfg.get("tokenizer_mode")
    try:
        words = HFTokenizer(str(home), context, tokenizer_mode=mode, local_files_only=True, **options)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{home}: its tokenizer cannot be read ({first_line(error)})") from None
    return Words(
        lambda texts: {"ids_NT": words(texts)},
        lambda text: len(words.tokenizer(words.clean_fn(text), verbose=False).input_ids),
        {"mode": mode, **options, **tokenizer_identity(words.tokenizer)},
    )


@lru_cache
def _clip_words(context: int, **options: Any) -> Words:
    """CLIP's byte-pair encoding; reading it takes longer than reading a small model, so evaluators share it."""
    words = SimpleTokenizer(context_length=context, **options)
    return Words(
        lambda texts: {"ids_NT": words(texts)},
        lambda text: len(words.encode(text)) + 2,
        {"bpe": sha256_file(default_bpe()), **options},
    )


def _architecture_name(model_cfg: Mapping[str, Any]) -> str | None:
    """open_clip's name of a config, where it is one of those it knows (but for the activation)."""
    wanted = {**model_cfg, "quick_gelu": None}
    return next(
        (n for n in open_clip.list_models() if {**open_clip.get_model_config(n), "quick_gelu": None} == wanted), None
    )
