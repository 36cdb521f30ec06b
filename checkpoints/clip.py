"""CLIPs on disk: open_clip's own folders and names in, a `Conditioner` out; and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..errors import UserError
from ..files import atomic_folder, read_json
from ..models.conditioner import Conditioner
from .folders import load_model_folder, refuse_pickles

__all__ = ["load_clip", "publish_clip"]

CONFIG, WEIGHTS, TOKENIZER = "open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"


def load_clip(source: str | Path) -> Conditioner:
    """A CLIP by folder or by name.

    Args:
        source: a folder written by `publish_clip` or open_clip (open_clip_config.json + safetensors), a conditioner
            folder of a pipeline, or `NAME/PRETRAINED` of open_clip (`ViT-B-32/laion2b_s34b_b79k`; downloads where
            the hub is reachable).
    Raises: UserError if it is none of these, or does not fit its config.
    """
    path = Path(source)
    if not path.exists() and str(source).count("/") == 1:
        return _from_name(*str(source).split("/"))
    refuse_pickles(path)
    if (path / CONFIG).is_file():
        return _from_open_clip_folder(path)
    return load_model_folder(Conditioner, path)


def publish_clip(model: Conditioner, folder: Path) -> None:
    """Write an open_clip folder: `open_clip.create_model("local-dir:<folder>")` loads it too."""
    config = {
        "model_cfg": model.config.model_cfg,
        "preprocess_cfg": {"mean": model.config.mean, "std": model.config.std, "interpolation": "bicubic"},
    }
    with atomic_folder(folder) as aside:
        save_file({k: v.contiguous() for k, v in model.clip.state_dict().items()}, aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(config, indent=2))
        if model.config.tokenizer_json is not None:
            (aside / TOKENIZER).write_text(model.config.tokenizer_json)
            special = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<end>"}
            (aside / "tokenizer_config.json").write_text(json.dumps(special, indent=2))


def _from_open_clip_folder(folder: Path) -> Conditioner:
    config: dict[str, Any] = read_json(folder / CONFIG, "CLIP config")
    if "model_cfg" not in config:
        raise UserError(f"{folder / CONFIG}: field 'model_cfg' is missing")
    preprocess = config.get("preprocess_cfg", {})
    tokenizer = folder / TOKENIZER
    model = Conditioner(
        model_cfg=config["model_cfg"],
        mean=preprocess.get("mean"),
        std=preprocess.get("std"),
        tokenizer_json=tokenizer.read_text() if tokenizer.is_file() else None,
        name=folder.name,
    )
    try:
        model.clip.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {WEIGHTS}; save the CLIP's weights as safetensors") from None
    except Exception as error:  # a damaged file or another architecture; torch lists every key
        raise UserError(f"{folder / WEIGHTS} does not fit {CONFIG} ({str(error).splitlines()[0]})") from None
    return model.eval()


def _from_name(name: str, pretrained: str) -> Conditioner:
    import open_clip

    cfg = open_clip.get_model_config(name)
    if cfg is None:
        raise UserError(f"{name}/{pretrained} is neither a folder nor a CLIP that open_clip knows")
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"CLIP {name}/{pretrained} cannot be loaded ({reason})") from None
    normalise = preprocess.transforms[-1]
    # OpenAI's weights were trained with QuickGELU whatever the model's name says; open_clip only warns of the mismatch.
    trained_as = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", cfg.get("quick_gelu", False))
    model = Conditioner(
        model_cfg={**cfg, "quick_gelu": trained_as},
        mean=list(map(float, normalise.mean)),
        std=list(map(float, normalise.std)),
        name=f"{name}/{pretrained}",
    )
    model.clip.load_state_dict(clip.state_dict())
    return model.eval()
