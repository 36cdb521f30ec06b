"""A model's identity: the same tensors give the same hash, wherever they came from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["weights_hash"]


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names and float32 values of all tensors of `module`, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
