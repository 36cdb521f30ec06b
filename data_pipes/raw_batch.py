"""Raw samples as one typed batch: what either loader gives to who wants whole arrays rather than a stage's own batch.

    Batches(RawDataset("raw/", "train"), raw_batch, 16, seed=0)
    StreamBatches(RawDataset("s3://bucket/raw", "train"), raw_batch, 16, seed=0)

B samples; N surface and M field points; V views of H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..models.cameras import Cameras
from .loader import RawSample

__all__ = ["RawBatch", "raw_batch"]


@dataclass(frozen=True)
class RawBatch:
    """Frames, units and ranges are those of `RawSample`'s properties; None where the dataset does not read the part."""

    uids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    surface_xyz: np.ndarray | None = None  # float32 [B, N, 3]
    surface_normal: np.ndarray | None = None  # float32 [B, N, 3]
    surface_rgb: np.ndarray | None = None  # float32 [B, N, 3]
    field_xyz: np.ndarray | None = None  # float32 [B, M, 3]
    field_sdf: np.ndarray | None = None  # float32 [B, M]
    field_rgb: np.ndarray | None = None  # float32 [B, M, 3]
    albedo: np.ndarray | None = None  # uint8 [B, V, H, W, 4]
    lit: np.ndarray | None = None  # uint8 [B, V, H, W, 4]
    depth: np.ndarray | None = None  # float32 [B, V, H, W]
    cameras: tuple[Cameras, ...] | None = None  # B times V cameras


ARRAYS = tuple(name for name in RawBatch.__dataclass_fields__ if name not in ("uids", "captions", "cameras"))


def raw_batch(items: list[tuple[RawSample, np.random.Generator]]) -> RawBatch:
    """A `collate` for `Batches` and `StreamBatches`; it draws no random numbers.

    Raises: UserError where samples have different numbers of points, views or pixels.
    """
    samples = [sample for sample, _ in items]
    arrays: dict[str, Any] = {}
    for name in ARRAYS:
        values = [getattr(sample, name) for sample in samples]
        if values[0] is None:
            continue
        if other := next((i for i, value in enumerate(values) if value.shape != values[0].shape), None):
            raise UserError(
                f"{samples[0].uid} and {samples[other].uid} have {name} of different shapes, {values[0].shape} and "
                f"{values[other].shape}: they do not make one batch; build the data with one size"
            )
        arrays[name] = np.stack(values)
    cameras = tuple(sample.cameras for sample in samples if sample.cameras is not None)
    return RawBatch(
        uids=tuple(sample.uid for sample in samples),
        captions=tuple(tuple(sample.captions) for sample in samples),
        cameras=cameras or None,
        **arrays,
    )
