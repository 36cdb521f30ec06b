"""Which samples training looks at without learning from them."""

from __future__ import annotations

from ..data_pipes.loader import RawDataset

__all__ = ["held_out_split"]


def held_out_split(train: RawDataset) -> RawDataset:
    """A split of seen kinds of objects beside `train`; `train` itself where the folder has no other."""
    present = {train.shards.splits(i) for i in range(len(train.shards))}
    for split in ("test_seen", "val", "test"):
        if split in present:
            return RawDataset(train.shards, split, train.parts)
    return train
