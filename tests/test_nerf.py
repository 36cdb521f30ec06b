"""Volume rendering against closed forms."""

import math

import numpy as np
import pytest
import torch

from shapeloom.models.cameras import orbit
from shapeloom.models.decoder import FieldValues
from shapeloom.models.nerf import integrate, render_nerf, render_rays


class ConstantFog:
    """Density `sigma` for |x| < half, of one colour."""

    device = torch.device("cpu")

    def __init__(self, sigma: float, half: float, rgb=(0.2, 0.5, 0.8)):
        self.sigma, self.half, self.rgb = sigma, half, torch.tensor(rgb)

    def __len__(self):
        return 1

    def __call__(self, points):
        inside = (points[..., 2].abs() < self.half).float()
        return FieldValues(-inside, self.sigma * inside, self.rgb.expand(*points.shape[:-1], 3))


def test_slab_has_alpha_one_minus_exp():
    density = torch.full((1, 10), 2.0)
    rgb, alpha, weights = integrate(density, torch.ones(1, 10, 3) * 0.5, torch.full((1, 10), 0.05))
    assert alpha.item() == pytest.approx(1 - math.exp(-1), abs=1e-6)
    assert rgb[0, 0].item() == pytest.approx(0.5 * alpha.item(), abs=1e-6)
    assert torch.allclose(weights.sum(-1), alpha)


@pytest.mark.parametrize("n_fine", [0, 64])
def test_ray_through_fog_matches_beer_lambert(n_fine):
    field = ConstantFog(sigma=1.5, half=0.5)
    origins, directions = torch.tensor([[0.1, 0.2, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    rgb, alpha = render_rays(field, origins, directions, n_coarse=128, n_fine=n_fine)
    assert alpha.item() == pytest.approx(1 - math.exp(-1.5), abs=0.02)
    assert torch.allclose(rgb / alpha[:, None], field.rgb, atol=1e-5)


def test_rays_that_miss_the_box_are_empty_and_any_count_works():
    field = ConstantFog(5.0, 1.0)
    origins = torch.tensor([[3.0, 3.0, 4.0]] * 7)
    directions = torch.tensor([[0.0, 0.0, -1.0]] * 7)
    rgb, alpha = render_rays(field, origins, directions)
    assert rgb.abs().max() == 0 and alpha.max() == 0


def test_views_are_deterministic_at_odd_sizes():
    field = ConstantFog(8.0, 0.5)
    first = render_nerf(field, orbit([0, 35], 20, size=13), chunk=50)
    assert first.shape == (2, 13, 13, 4) and first.dtype == np.uint8
    assert (first == render_nerf(field, orbit([0, 35], 20, size=13))).all()
    assert first[0, 6, 6, 3] > 250 and first[0, 0, 0, 3] < 250


def test_gradients_reach_the_density():
    density = torch.full((1, 8), 1.0, dtype=torch.float64, requires_grad=True)
    rgb = torch.rand(1, 8, 3, dtype=torch.float64)
    step = torch.full((1, 8), 0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: integrate(d, rgb, step)[0], (density,))
