"""From samples' arrays to a batch of tensors, and from a batch to the models' inputs."""

from __future__ import annotations

import numpy as np
import torch

from ..models.encoder import ViewInputs
from .loop import Batch

__all__ = ["stacked", "view_inputs"]


def stacked(rows: list[dict[str, np.ndarray]], prefix: str) -> Batch:
    """Samples' arrays as one batch, under `prefix.name`."""
    return {f"{prefix}.{name}": torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def view_inputs(batch: Batch) -> ViewInputs | None:
    """The views of a batch (`views.rgb`, …), or None where it has none."""
    if "views.rgb" not in batch:
        return None
    return ViewInputs(**{name: batch[f"views.{name}"] for name in ViewInputs.__dataclass_fields__})
