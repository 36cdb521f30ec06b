"""A set of very many texts, of which eight bytes each are kept."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["Hashes"]


class Hashes:
    """Of a hundred million texts, two are taken for one with a probability of 3 in 10,000 (the birthday bound)."""

    def __init__(self) -> None:
        self._hashes = array.array("Q")

    def add(self, text: str) -> None:
        self._hashes.append(_hash(text))

    def repeated(self) -> int:
        """How many were added that had been added before."""
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.uint64)))

    def holds(self, texts: Sequence[str]) -> np.ndarray:
        """[n] bool: which of these were added."""
        return np.isin(np.array([_hash(text) for text in texts], np.uint64), np.frombuffer(self._hashes, np.uint64))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
