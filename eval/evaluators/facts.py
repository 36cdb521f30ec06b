"""What is known of an evaluator, and how far it is from the conditioner of what it judges. No torch.

Shapes: N texts or pictures, H height and width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ..benchmark.schema import Independence

__all__ = [
    "Evaluator",
    "EvaluatorFacts",
    "Family",
    "independence",
    "open_clip_architecture",
    "transformers_architecture",
]

Family = Literal["open_clip", "transformers", "ours", "test"]

# (width, layers) of the vision transformers that have a letter.
LETTERS = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1408, 40): "g",
           (1664, 48): "bigG"}  # fmt: skip


@dataclass(frozen=True)
class EvaluatorFacts:
    """A CLIP, described.

    Args:
        name: as it was asked for.
        source: the folder or file it lies in, or its name where it comes from the hub's cache.
        hash: sha256 of all that an embedding depends on: weights, activation and heads, preparation of pictures,
            tokenizer, precision. The key of cached embeddings; the same wherever the files lie.
        weights: `models.hashing.weights_hash` of the same weights in a `Conditioner` (or, of transformers' CLIPs, in a
            `TransformersConditioner`).
        architecture: of the towers, from their configs: "ViT-B/32 at 224 + text 12x512 of 77". One tower: its half.
        pretraining: open_clip's tag ("openai", "laion2b_s34b_b79k") where a name, a file or its folder tells it.
        image_size, context_length: what the towers read, in pixels and tokens; 0 without that tower.
        mean, std: of the channels of pictures in [0, 1].
        quick_gelu: None where it does not apply, or differs between the towers.
        logit_scale: the factor on cosines (not its logarithm).
        towers: a sha256 of each tower's tensors before the projection, the same in open_clip's and transformers' form.
    """

    name: str
    source: str
    hash: str
    weights: str
    family: Family
    architecture: str
    pretraining: str | None
    image_size: int
    context_length: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quick_gelu: bool | None
    logit_scale: float | None
    notes: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvaluatorFacts:
        """The inverse of `to_json`. Raises TypeError for other fields than these."""
        fields: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        return cls(**fields)


class Evaluator(Protocol):
    """What scores need of a CLIP. Embeddings are float32 [N, D] of unit norm."""

    @property
    def facts(self) -> EvaluatorFacts: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def embed_pictures(self, images_NHW3: np.ndarray) -> np.ndarray:
        """Of u8 sRGB pictures, square, of any size."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each text, with its start and end tokens, before any are cut."""


def independence(facts: EvaluatorFacts, conditioner: EvaluatorFacts | None) -> Independence:
    """How far an evaluator is from the CLIP that conditions what it judges, as far as is known.

    "same weights": all tensors, or those of one tower. "same pre-training": one architecture and one known tag. A
    conditioner with a single tower is compared with that tower alone.
    """
    if conditioner is None:
        return "unknown"
    if facts.weights == conditioner.weights or set(facts.towers) & set(conditioner.towers):
        return "same weights"
    if set(conditioner.architecture.split(" + ")) <= set(facts.architecture.split(" + ")):
        same_tag = facts.pretraining is not None and facts.pretraining == conditioner.pretraining
        return "same pre-training" if same_tag else "same architecture"
    return "independent"


def open_clip_architecture(model_cfg: Mapping[str, Any]) -> str:
    """`EvaluatorFacts.architecture` of open_clip's `model_cfg`."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    size, layers, width = vision.get("image_size", 224), vision.get("layers", 12), vision.get("width", 768)
    if vision.get("timm_model_name"):
        image = f"{vision['timm_model_name']} at {size}"
    elif isinstance(layers, int):
        image = _vision_transformer(width, layers, vision.get("patch_size", 16), size)
    else:
        image = f"ResNet-{'-'.join(map(str, layers))}x{width} at {size}"
    context = text.get("context_length", 77)
    return f"{image} + {_text_transformer(text.get('width', 512), text.get('layers', 12), context)}"


def transformers_architecture(text: Mapping[str, Any] | None, vision: Mapping[str, Any] | None) -> str:
    """`EvaluatorFacts.architecture` of transformers' configs of the towers, either of which may be missing."""
    parts = []
    if vision is not None:
        sizes = [vision[name] for name in ("hidden_size", "num_hidden_layers", "patch_size", "image_size")]
        parts.append(_vision_transformer(*sizes))
    if text is not None:
        sizes = [text[name] for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings")]
        parts.append(_text_transformer(*sizes))
    return " + ".join(parts)


def _vision_transformer(width: int, layers: int, patch: int, size: int) -> str:
    return f"ViT-{LETTERS.get((width, layers), f'{layers}x{width}')}/{patch} at {size}"


def _text_transformer(width: int, layers: int, context: int) -> str:
    return f"text {layers}x{width} of {context}"
