"""`tiny-colours`: an evaluator without torch or weights, for tests and dry runs. It tells colours apart, nothing else.

A picture is the histogram of its pixels over eight hues and black, gray and white; pixels of the colour of the corners
are background. A caption is its colour words in the same space. So a red object is near "a red cube", "a red ball" and
every caption with as much red in it; a hash of the caption moves it a little, so that no two captions are the same.

Shapes: N pictures or texts, H height and width, C colours, K dimensions of the hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...files import sha256_json
from .facts import EvaluatorFacts

__all__ = ["NAME", "TinyColours", "tiny_colours_facts"]

NAME = "tiny-colours"

HUES_DEG = {"red": 0, "orange": 30, "yellow": 58, "green": 120, "cyan": 183, "blue": 230, "purple": 281, "pink": 335}
COLOURS = (*HUES_DEG, "black", "gray", "white")
WORDS = {colour: colour for colour in COLOURS} | {
    "grey": "gray",
    "brown": "orange",  # a dark orange, and shade is no colour here
    "gold": "yellow",
    "golden": "yellow",
    "aqua": "cyan",
    "turquoise": "cyan",
    "violet": "purple",
    "magenta": "pink",
}
BACKGROUND_STEPS = 8  # of 255, in any channel: as much as compression adds
GRAY_SATURATION, BLACK_VALUE, WHITE_VALUE = 0.2, 0.15, 0.85
HASH_DIMENSIONS, HASH_SHARE = 4, 0.05
IMAGE_SIZE, CONTEXT_LENGTH = 64, 77


def tiny_colours_facts() -> EvaluatorFacts:
    """Of the one there is."""
    numbers = [BACKGROUND_STEPS, GRAY_SATURATION, BLACK_VALUE, WHITE_VALUE, HASH_DIMENSIONS, HASH_SHARE]
    identity = sha256_json({"name": NAME, "hues": HUES_DEG, "words": WORDS, "numbers": numbers})
    return EvaluatorFacts(
        name=NAME,
        source=NAME,
        hash=identity,
        weights=identity,
        family="test",
        architecture="histogram of colours",
        pretraining=None,
        image_size=IMAGE_SIZE,
        context_length=CONTEXT_LENGTH,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        quick_gelu=None,
        logit_scale=None,
        notes=("knows colours alone: for tests and dry runs, its scores say nothing about a model",),
    )


@dataclass(frozen=True)
class TinyColours:
    """See the top of the file; the interface is `Evaluator`'s. D = C + 1 + K; a picture without an object has its own
    dimension, the one after the colours."""

    facts: EvaluatorFacts = field(default_factory=tiny_colours_facts)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        colours_NC = np.zeros((len(texts), len(COLOURS) + 1))
        for row, text in zip(colours_NC, texts, strict=True):
            for word in _words(text):
                if word in WORDS:
                    row[COLOURS.index(WORDS[word])] += 1
        return _joined(colours_NC, np.array([_hash(text) for text in texts]).reshape(-1, HASH_DIMENSIONS))

    def embed_pictures(self, images_NHW3: np.ndarray) -> np.ndarray:
        colours_NC = np.array([_histogram(image) for image in images_NHW3]).reshape(-1, len(COLOURS) + 1)
        same_NK = np.full((len(images_NHW3), HASH_DIMENSIONS), HASH_DIMENSIONS**-0.5)
        return _joined(colours_NC, same_NK)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(_words(text)) + 2 for text in texts]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _histogram(image_HH3: np.ndarray) -> np.ndarray:
    """Pixels of each colour, [C + 1]; the last is 1 where there is background alone."""
    counts = np.zeros(len(COLOURS) + 1)
    corner = image_HH3[0, 0].astype(int)
    is_object_HH = (np.abs(image_HH3.astype(int) - corner) > BACKGROUND_STEPS).any(axis=-1)
    if not is_object_HH.any():
        counts[-1] = 1
        return counts
    r, g, b = (image_HH3[is_object_HH] / 255.0).T
    value, least = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1)
    sextant = np.where(value == r, (g - b) / safe, np.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    away = np.abs(60 * sextant[:, None] - np.array([*HUES_DEG.values()])) % 360
    colour = np.minimum(away, 360 - away).argmin(axis=1)
    gray = np.select(
        [value < BLACK_VALUE, value > WHITE_VALUE], [COLOURS.index("black"), COLOURS.index("white")],
        COLOURS.index("gray"),
    )  # fmt: skip
    is_gray = (chroma < GRAY_SATURATION * value) | (value < BLACK_VALUE)
    counts[:-1] = np.bincount(np.where(is_gray, gray, colour), minlength=len(COLOURS))
    return counts


def _hash(text: str) -> np.ndarray:
    """A unit vector [K] of the caption."""
    raw = np.frombuffer(hashlib.sha256(text.encode()).digest()[: 2 * HASH_DIMENSIONS], dtype="<u2")
    centred = raw / 65535 - 0.5
    return centred / np.linalg.norm(centred)


def _joined(colours_NC: np.ndarray, hash_NK: np.ndarray) -> np.ndarray:
    """Unit colours (none: zeros) beside a little of the hash, of unit norm together."""
    norms = np.linalg.norm(colours_NC, axis=1, keepdims=True)
    rows = np.concatenate([colours_NC / np.where(norms > 0, norms, 1), HASH_SHARE * hash_NK], axis=1)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
