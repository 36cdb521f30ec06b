"""Pictures and captions to unit embeddings, kept by content: a picture is embedded once by an evaluator.

Imports no torch: a run whose embeddings are all there opens no evaluator.

Shapes: V views, D embedding width, N captions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...data_pipes.raw_sample import decode_npz, encode_npz
from ...errors import UserError
from ...files import sha256_json, write_atomic
from ...progress import Bar
from ..evaluators.registry import Evaluator, EvaluatorFacts
from .renders import RenderCache, Rendered

__all__ = ["EmbeddingCache"]


class EmbeddingCache:
    """One evaluator's embeddings in a folder that runs may share.

    Args:
        opened: gives the evaluator; called when something is to be embedded, and once.
    """

    def __init__(self, folder: Path, facts: EvaluatorFacts, opened: Callable[[], Evaluator]) -> None:
        self.folder, self.facts, self._open = folder / "embeddings" / facts.hash[:24], facts, opened
        self._evaluator: Evaluator | None = None

    @property
    def evaluator(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = self._open()
        return self._evaluator

    def embed(self, renders: RenderCache, rendered: Sequence[Rendered], description: str) -> None:
        """Embed the pictures of objects that are not embedded yet. All views of an object and shading are one batch,
        so that what comes out does not depend on which process had which objects."""
        todo = {
            one.key: one for one in rendered if one.pixels and not all(map(self._kept, map(self._path, _hashes(one))))
        }
        if not todo:
            return
        with Bar(len(todo), description) as bar:
            for one in todo.values():
                for shading, views_VSS3 in renders.pictures(one).items():
                    path = self._path((one.pixels or {})[shading])
                    if not self._kept(path):
                        write_atomic(path, _encoded(self.evaluator.embed_pictures(views_VSS3)))
                bar.update(1)

    def of(self, rendered: Rendered, shading: str) -> np.ndarray:
        """Unit embeddings f32 [V, D] of an object's pictures."""
        assert rendered.pixels is not None, "a miss has no pictures"
        return np.load(self._path(rendered.pixels[shading]), allow_pickle=False)

    def captions(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Unit embeddings f32 [N, D], and how many tokens each caption has, int [N]."""
        path = self.folder / "captions" / f"{sha256_json(list(captions))}.npz"
        try:
            kept = decode_npz(path.read_bytes(), str(path))
            return kept["embeddings"], kept["tokens"]
        except (OSError, UserError, KeyError):
            pass
        embeddings_ND = np.ascontiguousarray(self.evaluator.embed_texts(list(captions)), np.float32)
        tokens_N = np.array(self.evaluator.count_tokens(list(captions)), np.int64)
        write_atomic(path, encode_npz(embeddings=embeddings_ND, tokens=tokens_N))
        return embeddings_ND, tokens_N

    def _path(self, pixels: str) -> Path:
        return self.folder / pixels[:2] / f"{pixels}.npy"

    @staticmethod
    def _kept(path: Path) -> bool:
        """Whether the file is there and whole: a disk may have lost the end of it."""
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False).ndim == 2
        except (OSError, ValueError, EOFError):
            return False


def _hashes(rendered: Rendered) -> list[str]:
    return list((rendered.pixels or {}).values())


def _encoded(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, np.float32), allow_pickle=False)
    return buffer.getvalue()
