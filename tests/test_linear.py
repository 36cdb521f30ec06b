"""Linear layers by oneDNN against torch's own; where they may not be used, torch's own they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shapeloom.models import linear as module
from shapeloom.models.linear import Linear, linear
from shapeloom.models.transformer import MLP

ACTIVATIONS = {"none": lambda x: x, "silu": F.silu, "gelu": F.gelu}


@pytest.fixture
def kernels(monkeypatch):
    """How often oneDNN's kernel was asked."""
    asked = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: asked.append(args[3]) or real(*args))
    return asked


needs_onednn = pytest.mark.skipif(not module._ONEDNN_WORKS, reason="this build of torch has no such kernel")


@needs_onednn
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 300, 93), (1, 1, 64), (3, 2, 4, 16)], ids=str)
def test_the_same_as_torch(kernels, activation, shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(33, shape[-1]), torch.randn(33)
    for b in (bias, None):
        expected = ACTIVATIONS[activation](F.linear(x.double(), weight.double(), None if b is None else b.double()))
        with torch.no_grad():
            found = linear(x, weight, b, activation)
        torch.testing.assert_close(found.double(), expected, atol=3e-5, rtol=1e-5)
    assert len(kernels) == 2


@needs_onednn
def test_pieces_of_larger_tensors(kernels):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, 9).transpose(0, 1)[..., 1:], torch.randn(5, 9)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight[:, :-1], weight[:, -1]), F.linear(x, weight[:, :-1], weight[:, -1]))
    assert len(kernels) == 1


def test_gradients_other_types_and_nothing_at_all_go_torchs_way(kernels):
    torch.manual_seed(0)
    layer, x = Linear(8, 4), torch.randn(3, 8)
    assert torch.equal(layer(x, "silu"), F.silu(F.linear(x, layer.weight, layer.bias)))
    layer(x, "gelu").sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64
        assert layer.float()(x[:0]).shape == (0, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert kernels == []


def test_an_mlp_is_its_layers(kernels):
    torch.manual_seed(0)
    mlp, x = MLP(Linear(8, 32), nn.GELU(), Linear(32, 8)), torch.randn(2, 5, 8)
    expected = mlp[2](F.gelu(mlp[0](x)))
    assert torch.equal(mlp(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=1e-5)
