"""Linear layers by the fastest kernels there are, and the activation after them in the same pass where that can be."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Activation", "Linear", "linear"]

Activation = Literal["none", "silu", "gelu"]
_ONEDNN = {"none": ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "none")}  # its name, and its algorithm


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: Activation = "none"
) -> torch.Tensor:
    """activation(x·weightᵀ + bias), [..., I] to [..., O]; weight [O, I].

    Without gradients, in float32 on a CPU, by oneDNN: `F.linear` goes to MKL there, which on AMD's processors is slower
    by a fifth (`launch/bench/denoiser.py`), and the activation would be a pass of its own. The same to rounding.
    """
    if _ONEDNN_WORKS and _plain(x) and _plain(weight):
        name, algorithm = _ONEDNN[activation]
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()  # it reads them as such
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, name, [], algorithm)
    y = F.linear(x, weight, bias)
    if activation == "silu":
        return F.silu(y, inplace=True)
    return F.gelu(y) if activation == "gelu" else y


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: torch.Tensor, activation: Activation = "none") -> torch.Tensor:
        return linear(x, self.weight, self.bias, activation)


def _plain(x: torch.Tensor) -> bool:
    """Nothing but a product in float32 on the CPU is asked for."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _works() -> bool:
    """Whether this build has oneDNN's kernel, which is no public part of torch."""
    try:
        with torch.no_grad():
            x, eye = torch.tensor([[-1.0, 2.0]]), torch.eye(2)
            y = torch.ops.mkldnn._linear_pointwise(x, eye, None, "swish", [], "")
            return torch.allclose(y, F.silu(x))
    except (AttributeError, RuntimeError):
        return False


_ONEDNN_WORKS = _works()
