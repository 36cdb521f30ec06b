"""Volume rendering against closed forms, and against diffusers' Shap-E renderer at the same random numbers."""

import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.shap_e.camera import create_pan_cameras
from diffusers.pipelines.shap_e.renderer import StratifiedRaySampler

from shapeloom.errors import UserError
from shapeloom.launch.bench.reference import CHAIR, chair_field, diffusers_renderer
from shapeloom.models.cameras import Cameras, orbit
from shapeloom.models.decoder import FieldHead, FieldValues, ImplicitField, SurfaceVolume, to_z_up, volsdf_density
from shapeloom.models.nerf import RayNoise, RenderedRays, integrate, render_nerf, render_rays
from shapeloom.models.occupancy import RESOLUTION, Occupancy


class AnalyticField:
    """One asset of one colour, its density a function of points [..., 3]; counts what it is asked for."""

    device = torch.device("cpu")

    def __init__(self, density, rgb=(0.2, 0.5, 0.8)):
        self.density, self.rgb, self.evaluations = density, torch.tensor(rgb), 0

    def __len__(self):
        return 1

    def __call__(self, points_BP3):
        self.evaluations += points_BP3.shape[0] * points_BP3.shape[1]
        density_BP = self.density(points_BP3)
        rgb_BP3 = self.rgb.to(points_BP3).expand(points_BP3.shape)
        return FieldValues(torch.zeros_like(density_BP), density_BP, rgb_BP3)


def fog(sigma, half):
    """Constant for |z| < half."""
    return AnalyticField(lambda points: sigma * (points[..., 2].abs() < half).float())


def volsdf_sphere(radius=0.5, beta=0.02):
    return AnalyticField(lambda points: volsdf_density(points.norm(dim=-1) - radius, beta))


def shap_e_head():
    return FieldHead(
        kind="nerstf",
        hidden=256,
        n_frequencies=15,
        n_generated=4,
        n_shared=2,
        generated_bias=False,
        density_scale=0.02,
    )


def random_shap_e_field():
    """Shap-E's layers with random weights: haze everywhere, as rough as its highest frequencies."""
    torch.manual_seed(0)
    head = shap_e_head().requires_grad_(False)
    head.out[-1].weight *= 20
    return ImplicitField(head, [torch.randn(1, *shape) / shape[1] ** 0.5 for shape in head.shapes])


def small_fields(assets=3):
    """Random assets of a small head of Shap-E's kind, their densities and colours far from equal."""
    torch.manual_seed(1)
    head = FieldHead(
        kind="nerstf",
        hidden=32,
        n_frequencies=3,
        n_generated=2,
        n_shared=1,
        generated_bias=True,
        density_scale=0.02,
    )
    with torch.no_grad():
        head.out[-1].weight *= 10
    return ImplicitField(head, [torch.randn(assets, *shape, requires_grad=True) for shape in head.shapes])


@pytest.fixture(params=["chair", "random"])
def shap_e_field(request):
    if request.param == "random":
        return random_shap_e_field()
    if not CHAIR.is_file():
        pytest.skip(f"{CHAIR} does not exist (set SHAPELOOM_CHAIR)")
    return chair_field()


@pytest.fixture
def chair():
    if not CHAIR.is_file():
        pytest.skip(f"{CHAIR} does not exist (set SHAPELOOM_CHAIR)")
    return chair_field()


def camera_rays(size, view=0):
    """Rays of one view of a camera around the object, origins_R3 and directions_R3."""
    origins, directions = orbit([20.0 + 75 * view], 25.0, size=size).rays()
    return torch.from_numpy(origins.reshape(-1, 3)), torch.from_numpy(directions.reshape(-1, 3))


def psnr(a, b):
    error = (torch.as_tensor(a).double() - torch.as_tensor(b).double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Closed forms


def test_slab_has_alpha_one_minus_exp():
    density = torch.full((1, 10), 2.0)
    rgb, alpha, weights = integrate(density, torch.ones(1, 10, 3) * 0.5, torch.full((1, 10), 0.05))
    assert alpha.item() == pytest.approx(1 - math.exp(-1), abs=1e-6)
    assert rgb[0, 0].item() == pytest.approx(0.5 * alpha.item(), abs=1e-6)
    assert torch.allclose(weights.sum(-1), alpha)


def test_gradients_of_the_integral():
    torch.manual_seed(0)
    density = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    rgb = torch.rand(2, 8, 3, dtype=torch.float64, requires_grad=True)
    step = torch.rand(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(integrate, (density, rgb, step))


@pytest.mark.parametrize("n_fine", [0, 64])
def test_ray_through_fog_matches_beer_lambert(n_fine):
    field = fog(sigma=1.5, half=0.5)
    origins, directions = torch.tensor([[0.1, 0.2, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    seen = render_rays(field, origins, directions, n_coarse=129, n_fine=n_fine)
    assert seen.alpha.item() == pytest.approx(1 - math.exp(-1.5), abs=0.01)
    assert seen.coarse_alpha.item() == pytest.approx(1 - math.exp(-1.5), abs=0.01)
    assert torch.allclose(seen.rgb / seen.alpha[:, None], field.rgb, atol=1e-5)
    # the mean of an exponential of rate 1.5 cut off at 1, from where the fog begins
    assert seen.depth.item() == pytest.approx(3.5 + 1 / 1.5 - 1 / math.expm1(1.5), abs=0.01)


def test_the_depth_of_a_solid_is_where_it_begins():
    field = AnalyticField(lambda points: 1e4 * (points.norm(dim=-1) < 0.5).float())
    origins, directions = torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.3, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]] * 2)
    seen = render_rays(field, origins, directions)
    assert seen.alpha.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert seen.depth.tolist() == pytest.approx([3.5, 3.6], abs=0.005)


def test_rays_from_inside_begin_at_their_origin():
    field = AnalyticField(lambda points: torch.ones_like(points[..., 0]))
    origins, directions = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 5.0]]), torch.tensor([[0.0, 0.0, 1.0]] * 2)
    alpha = render_rays(field, origins, directions).alpha
    assert alpha[0].item() == pytest.approx(1 - math.exp(-0.5), abs=1e-5)
    assert alpha[1] == 0  # the box is behind it


# The release's scheme: diffusers' renderer, given the same numbers


def theirs(renderer, rays_R23):
    _, sampler, coarse = renderer.render_rays(rays_R23[None], StratifiedRaySampler(), 64)
    return renderer.render_rays(rays_R23[None], sampler, 128, prev_model_out=coarse)[0][0]


def pan_rays(size, view=3):
    """One view of the release's cameras: their rays [R, 2, 3], and origins_R3, directions_R3 in our frame."""
    rays_R23 = create_pan_cameras(size).camera_rays[0].unflatten(0, (20, -1))[view]
    return rays_R23, *(rays_R23 @ to_z_up(torch.eye(3)).T).unbind(1)


def test_pixels_are_those_of_diffusers_at_the_same_noise(shap_e_field):
    rays_R23, origins, directions = pan_rays(16)
    noise = RayNoise.draw(256, generator=generator())  # its coarse sampler reseeds with 0 before the three draws
    seen = render_rays(shap_e_field, origins, directions, noise=noise)
    expected_R3 = theirs(diffusers_renderer(shap_e_field), rays_R23)
    assert seen.alpha.std() > 0.05  # there is something to compare
    assert (seen.rgb - expected_R3).abs().max() < 1e-4


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_backgrounds_are_those_of_diffusers(shap_e_field, level):
    rays_R23, origins, directions = pan_rays(6)
    renderer = diffusers_renderer(shap_e_field)
    renderer.void.background.data.fill_(level)
    noise = RayNoise.draw(36, generator=generator())
    on_background = render_rays(shap_e_field, origins, directions, noise=noise).over(torch.full((3,), level))
    assert (on_background - theirs(renderer, rays_R23)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [12, 20])
def test_sizes_that_fill_no_batch(shap_e_field, size):
    """decode_to_image wants 20·size² to be a multiple of its batch of rays, 4096; here any split will do."""
    _, origins, directions = pan_rays(size)
    noise = RayNoise.draw(size**2, n_coarse=8, n_fine=8, generator=generator())
    options = {"n_coarse": 8, "n_fine": 8}
    whole = render_rays(shap_e_field, origins, directions, noise=noise, **options)
    parts = [
        render_rays(
            shap_e_field,
            origins[start : start + 100],
            directions[start : start + 100],
            noise=RayNoise(*(x[start : start + 100] for x in (noise.coarse, noise.choice, noise.place))),
            **options,
        )
        for start in range(0, size**2, 100)
    ]
    assert torch.allclose(torch.cat([part.rgb for part in parts]), whole.rgb, atol=1e-5)
    assert torch.allclose(torch.cat([part.depth for part in parts]), whole.depth, atol=1e-4)


# Several assets, and none


def test_several_assets_at_once_are_those_one_at_a_time():
    fields = small_fields(3)
    # views from different distances: each asset has another number of rays that miss the box
    cameras = [orbit([40.0 * i], 20.0, size=9, distance=3.0 + 1.5 * i) for i in range(3)]
    pairs = [[torch.from_numpy(x.reshape(-1, 3)) for x in camera.rays()] for camera in cameras]
    origins_BR3, directions_BR3 = (torch.stack(x) for x in zip(*pairs, strict=True))
    noise = RayNoise.draw(3, 81, n_coarse=16, n_fine=16, generator=generator())
    for occupancy in (None, Occupancy.of(fields, 16)):
        together = render_rays(
            fields, origins_BR3, directions_BR3, n_coarse=16, n_fine=16, noise=noise, occupancy=occupancy
        )
        assert len({int((alpha_R > 0).sum()) for alpha_R in together.alpha}) == 3
        for b in range(3):
            alone = render_rays(
                fields[b],
                origins_BR3[b],
                directions_BR3[b],
                n_coarse=16,
                n_fine=16,
                noise=RayNoise(noise.coarse[b], noise.choice[b], noise.place[b]),
                occupancy=occupancy and Occupancy(occupancy.cells_BNNN[b : b + 1]),
            )
            for name in ("rgb", "alpha", "depth", "coarse_rgb", "coarse_alpha"):
                assert torch.allclose(getattr(together, name)[b], getattr(alone, name), atol=1e-4), name


@pytest.mark.parametrize("skip", [False, True])
def test_rays_that_miss_are_empty_and_not_evaluated(skip):
    field = fog(5.0, 1.0)
    occupancy = Occupancy.of(field, 8) if skip else None
    field.evaluations = 0
    origins = torch.tensor([[3.0, 3.0, 4.0]] * 7)
    seen = render_rays(field, origins, torch.tensor([[0.0, 0.0, -1.0]] * 7), occupancy=occupancy)
    assert seen.rgb.shape == (7, 3) and seen.depth.shape == (7,)
    assert not any(x.any() for x in (seen.rgb, seen.alpha, seen.depth, seen.coarse_rgb, seen.coarse_alpha))
    assert field.evaluations == 0


def test_an_empty_field_is_empty():
    field = fog(0.0, 1.0)
    occupancy = Occupancy.of(field)
    assert not occupancy.cells_BNNN.any()
    assert not render_rays(field, *camera_rays(4), occupancy=occupancy).alpha.any()
    assert not render_nerf(field, orbit([0], 20, size=60)).any()


# Evaluation


def test_views_are_the_same_in_any_chunks():
    field = fog(8.0, 0.5)
    first = render_nerf(field, orbit([0, 35], 20, size=13), chunk=50)
    assert first.shape == (2, 13, 13, 4) and first.dtype == np.uint8
    assert (first == render_nerf(field, orbit([0, 35], 20, size=13))).all()
    assert (first[1] == render_nerf(field, orbit([35], 20, size=13))[0]).all()
    assert first[0, 6, 6, 3] > 250 and first[0, 0, 0, 3] < 250


def test_rendering_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    render_nerf(volsdf_sphere(), orbit([0], 20, size=60))
    render_rays(volsdf_sphere(), *camera_rays(8), noise=RayNoise.draw(64, generator=generator()))
    assert torch.equal(state, torch.get_rng_state())


def test_without_noise_is_closer_to_the_integral_than_one_draw():
    field, rays = volsdf_sphere(), camera_rays(24)
    truth = render_rays(field, *rays, n_coarse=1024, n_fine=1024).rgb
    noisy = [render_rays(field, *rays, noise=RayNoise.draw(24**2, generator=generator(seed))).rgb for seed in range(3)]
    assert psnr(render_rays(field, *rays).rgb, truth) > max(psnr(image, truth) for image in noisy) + 3


def test_impossible_requests_are_named():
    cameras = orbit([0], 20, size=4)
    with pytest.raises(UserError, match="coarse samples"):
        render_nerf(fog(1.0, 0.5), cameras, n_coarse=0)
    with pytest.raises(UserError, match="0x4 image"):
        render_nerf(fog(1.0, 0.5), Cameras(cameras.camera_to_world, cameras.focal, 0, 4))
    with pytest.raises(ValueError, match="noise must have shapes"):
        render_rays(fog(1.0, 0.5), *camera_rays(4), noise=RayNoise.draw(16, n_fine=2, generator=generator()))
    with pytest.raises(ValueError, match="for 2 assets"):
        render_rays(small_fields(2), *camera_rays(4))


# Empty space


def test_skipping_loses_nothing_of_the_chair(chair):
    rays, occupancy = camera_rays(28), Occupancy.of(chair)
    for noise in (None, RayNoise.draw(28**2, generator=generator())):
        plain = render_rays(chair, *rays, noise=noise)
        skipping = render_rays(chair, *rays, noise=noise, occupancy=occupancy)
        assert plain.alpha.mean() > 0.05
        assert psnr(skipping.rgb, plain.rgb) > 90 and psnr(skipping.alpha, plain.alpha) > 90
        assert psnr(skipping.coarse_rgb, plain.coarse_rgb) > 90


def test_skipping_loses_nothing_of_a_density_that_is_never_zero():
    field, rays = volsdf_sphere(), camera_rays(40)
    plain = render_rays(field, *rays)
    occupancy = Occupancy.of(field)
    field.evaluations = 0
    skipping = render_rays(field, *rays, occupancy=occupancy)
    assert psnr(skipping.rgb, plain.rgb) > 90 and psnr(skipping.alpha, plain.alpha) > 90
    assert 0 < field.evaluations < 0.7 * 40**2 * (64 + 128)


def test_views_skip_empty_space_unless_told_otherwise():
    field = AnalyticField(lambda points: 50.0 * (points.norm(dim=-1) < 0.3).float())
    cameras = orbit([0, 90], 20, size=48)
    plain, plain_evaluations = render_nerf(field, cameras, skip_empty=False), field.evaluations
    field.evaluations = 0
    skipping = render_nerf(field, cameras)
    assert (plain == skipping).all()
    assert field.evaluations < 0.5 * plain_evaluations


def test_a_few_rays_are_cheaper_without_a_grid():
    field = volsdf_sphere()
    render_nerf(field, orbit([0], 20, size=8))
    assert field.evaluations <= 64 * (64 + 128)


@pytest.mark.parametrize(
    "inside",
    [
        lambda p: (p[..., 1] - 0.0156).abs() < 0.006,  # a plate in the middle of a layer of cells
        lambda p: p[..., 1:].abs().amax(-1) < 0.015,  # a rod along x, on the cells' edges
        lambda p: (p.norm(dim=-1) - 0.6).abs() < 0.02,  # a shell
    ],
    ids=["plate", "rod", "shell"],
)
def test_thin_parts_are_found(inside):
    occupancy = Occupancy.of(AnalyticField(lambda points: 30.0 * inside(points).float()))
    points_P3 = torch.rand(2_000_000, 3, generator=generator()) * 2 - 1
    part_P3 = points_P3[inside(points_P3)]
    assert len(part_P3) > 300
    assert occupancy(part_P3[None]).float().mean() > 0.999
    assert occupancy(points_P3[None]).float().mean() < 0.25


def test_a_grid_asks_little_more_than_once_a_cell():
    field = AnalyticField(lambda points: 50.0 * (points.norm(dim=-1) < 0.3).float())
    Occupancy.of(field)
    assert RESOLUTION**3 <= field.evaluations < 1.1 * RESOLUTION**3


def test_what_is_not_a_number_is_not_taken_for_empty():
    field = AnalyticField(lambda points: torch.where(points[..., 0] > 0.5, torch.nan, torch.zeros(())))
    occupied = Occupancy.of(field)(torch.tensor([[[0.8, 0.0, 0.0], [-0.8, 0.0, 0.0]]]))
    assert occupied.tolist() == [[True, False]]


# Training


def test_gradients_reach_all_that_makes_the_picture():
    fields = small_fields(2)
    fields.head.zero_grad()
    origins, directions = (torch.stack([x, x]) for x in camera_rays(8))
    noise = RayNoise.draw(2, 64, n_coarse=16, n_fine=16, generator=generator())
    seen = render_rays(fields, origins, directions, n_coarse=16, n_fine=16, noise=noise)
    (seen.rgb.sum() + seen.alpha.sum() + seen.coarse_rgb.sum() + seen.coarse_alpha.sum()).backward()
    rows = fields.head.out[-1].weight.grad.norm(dim=1)
    assert (rows[1:3] > 0).all() and (rows[6:12] > 0).all()  # densities, and colours of both volumes
    assert (rows[:1] == 0).all() and (rows[3:6] == 0).all()  # signed distance and the surface's colour are not seen
    for weight in fields.weights:
        assert weight.grad.isfinite().all() and (weight.grad.flatten(1).norm(dim=1) > 0).all()


def test_gradients_are_the_slopes_of_the_picture():
    """By central differences; without fine samples, whose places would move with the weights."""
    field = small_fields(1)
    field.head.double()
    weight = field.weights[0].detach().double().requires_grad_()
    other = field.weights[1].detach().double()
    rays = [x.double() for x in camera_rays(6)]

    def picture(weight):
        seen = render_rays(ImplicitField(field.head, [weight, other]), *rays, n_coarse=12, n_fine=0)
        return seen.rgb.sum() + 2 * seen.alpha.sum() + 3 * seen.coarse_rgb[..., 0].sum()

    (gradient,) = torch.autograd.grad(picture(weight), weight)
    step = torch.randn(weight.shape, generator=generator(), dtype=torch.float64) * 1e-6
    with torch.no_grad():
        slope = (picture(weight + step) - picture(weight - step)) / 2
    assert slope.item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)


def test_a_surface_volume_renders_and_learns():
    head = FieldHead(
        kind="volsdf",
        hidden=16,
        n_frequencies=2,
        n_generated=1,
        n_shared=1,
        generated_bias=True,
        density_scale=0.02,
    )
    torch.manual_seed(0)
    weights = [torch.randn(1, *shape, requires_grad=True) for shape in head.shapes]
    seen = render_rays(SurfaceVolume(ImplicitField(head, weights), 0.1), *camera_rays(8), n_coarse=16, n_fine=16)
    assert isinstance(seen, RenderedRays)
    seen.alpha.sum().backward()
    assert weights[0].grad.norm() > 0
