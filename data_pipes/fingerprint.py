"""Which data a run was trained on, in a few characters: so that it is not gone on with on others."""

from __future__ import annotations

import hashlib

import numpy as np

from ..files import sha256_json
from .latents import LatentDataset
from .loader import RawDataset

__all__ = ["data_fingerprint"]


def data_fingerprint(dataset: LatentDataset | RawDataset) -> str:
    """A hash of what a dataset holds and in which order, raw samples or latents alike.

    It is of the manifest (settings, and the sha256 of every shard) and of which samples the split has, not of where the
    folder is. No shard is read.
    """
    rows = hashlib.sha256(np.ascontiguousarray(dataset.indices, "<i8").data).hexdigest()
    return sha256_json([dataset.shards.hash, rows])
