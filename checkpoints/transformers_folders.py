"""CLIP folders of transformers, and the towers inside diffusers' pipeline folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.utils.logging import disable_progress_bar

from ..errors import UserError
from ..files import read_json
from ..models.transformers_clip import TransformersConditioner

__all__ = ["load_transformers_clip"]


def load_transformers_clip(folder: Path) -> TransformersConditioner:
    """A whole CLIP folder as transformers saves it, or the tower or towers of a diffusers pipeline folder.

    Raises: UserError if there is none, or it is damaged.
    """
    disable_progress_bar()  # it would run for a second and hide ours
    try:
        if (folder / "model_index.json").is_file():
            return _of_pipeline(folder)
        text = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True)
        vision = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
        return _joined(folder.name, text, CLIPTokenizer.from_pretrained(folder), vision, _processor(folder))
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a damaged folder
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: its CLIP cannot be read ({reason})") from None


def _of_pipeline(folder: Path) -> TransformersConditioner:
    text = tokenizer = vision = processor = None
    if (folder / "text_encoder").is_dir():
        text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    if (folder / "image_encoder").is_dir():
        vision = CLIPVisionModel.from_pretrained(folder / "image_encoder", local_files_only=True)
        processor = _processor(folder / "image_processor")
    if text is None and vision is None:
        raise UserError(f"{folder} has neither a text_encoder nor an image_encoder")
    return _joined(folder.name, text, tokenizer, vision, processor)


def _processor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    return read_json(path, "picture settings") if path.is_file() else CLIPImageProcessor().to_dict()


def _joined(
    name: str, text: Any, tokenizer: Any, vision: Any, processor: dict[str, Any] | None
) -> TransformersConditioner:
    processor = processor or {}
    model = TransformersConditioner(
        text_config=text.config.to_dict() if text is not None else None,
        vision_config=vision.config.to_dict() if vision is not None else None,
        vision_projection=isinstance(vision, CLIPVisionModelWithProjection),
        mean=processor.get("image_mean"),
        std=processor.get("image_std"),
        tokenizer_json=tokenizer.backend_tokenizer.to_str() if tokenizer is not None else None,
        name=name,
    )
    for ours, theirs in ((model.text, text), (model.vision, vision)):
        if ours is not None:
            ours.load_state_dict(theirs.state_dict())
    return model.eval()
