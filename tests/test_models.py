"""The networks: shapes, independence of batch mates, conditioning, guidance."""

import pytest
import torch

from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.denoiser import Condition, Denoiser, timestep_embedding
from shapeloom.models.guidance import guided, sample_latents
from shapeloom.models.hashing import weights_hash


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(n_latents=16, channels=8, width=32, heads=2, hidden=16).eval()


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    sizes = {"text_width": 12, "image_width": 20, "pooled_width": 6, "max_text_tokens": 5}
    model = Denoiser(16, 8, width=32, heads=2, layers=2, **sizes).eval()
    torch.nn.init.normal_(model.latent_out.weight)  # it starts at zero, which would hide everything
    return model


def make_condition(batch=3, words=5, text=True, image=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Condition(
        text_tokens=torch.randn(batch, words, 12, generator=g),
        text_mask=torch.arange(words) < torch.tensor([words] + [2] * (batch - 1))[:, None],
        text_pooled=torch.nn.functional.normalize(torch.randn(batch, 6, generator=g), dim=-1),
        has_text=torch.full((batch,), text),
        image_tokens=torch.randn(batch, 4, 20, generator=g),
        image_pooled=torch.nn.functional.normalize(torch.randn(batch, 6, generator=g), dim=-1),
        has_image=torch.full((batch,), image),
    )


def test_latents_are_bounded_and_assets_independent(autoencoder):
    surface = torch.randn(3, 50, 9)
    z = autoencoder.encode(surface)
    assert z.shape == (3, 16, 8) and z.abs().max() < 1
    assert torch.allclose(autoencoder.encode(surface[1:2])[0], z[1], atol=1e-5)


def test_the_encoder_ignores_the_order_of_points(autoencoder):
    surface = torch.randn(1, 50, 9)
    shuffled = surface[:, torch.randperm(50)]
    assert torch.allclose(autoencoder.encode(surface), autoencoder.encode(shuffled), atol=1e-5)


def test_field_equals_a_hand_written_mlp(autoencoder):
    """The batched field against one matrix product after the other, for one asset."""
    from shapeloom.models.transformer import fourier_features

    z, points = torch.randn(2, 16, 8).tanh(), torch.rand(2, 7, 3) * 2 - 1
    field = autoencoder.decode(z)
    values = field(points)
    h = fourier_features(points[1], field.head.n_frequencies)
    for weight in field.weights:
        h = torch.nn.functional.silu(torch.cat([h, torch.ones(7, 1)], -1) @ weight[1].T)
    out = field.head.out(h)
    assert torch.allclose(values.sdf_BP[1], 0.1 * out[:, 0], atol=1e-5)
    assert torch.allclose(values.rgb_BP3[1], out[:, 1:].sigmoid(), atol=1e-5)
    assert torch.allclose(field[1](points[1:]).sdf_BP[0], values.sdf_BP[1], atol=1e-5)


def test_density_is_volsdf(autoencoder):
    field = autoencoder.decode(torch.randn(1, 16, 8).tanh())
    values = field(torch.rand(1, 500, 3) * 2 - 1)
    beta = field.head.density_scale
    laplace = torch.distributions.Laplace(0.0, beta)
    assert torch.allclose(values.density_BP, laplace.cdf(-values.sdf_BP) / beta, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter(autoencoder, denoiser):
    field, _ = autoencoder(torch.randn(2, 30, 9), torch.randn(2, 16, 8), torch.rand(2))
    values = field(torch.rand(2, 20, 3))
    (values.sdf_BP.sum() + values.rgb_BP3.sum()).backward()
    assert [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    condition = make_condition(4)
    condition = Condition(**{**vars(condition), "has_text": torch.tensor([1, 1, 0, 0]).bool()})
    condition = Condition(**{**vars(condition), "has_image": torch.tensor([1, 0, 1, 0]).bool()})
    denoiser(torch.randn(4, 16, 8), torch.rand(4), condition).square().sum().backward()
    silent = [n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    denoiser.zero_grad()


def test_padding_and_absent_conditions_have_no_effect(denoiser):
    x, t = torch.randn(3, 16, 8), torch.rand(3)
    condition = make_condition()
    base = denoiser(x, t, condition)
    padded = condition.text_tokens.clone()
    padded[1:, 2:] = 100.0
    assert torch.allclose(denoiser(x, t, Condition(**{**vars(condition), "text_tokens": padded})), base, atol=1e-4)
    without = condition.keep(text=False, image=True)
    other = Condition(**{**vars(make_condition(seed=1)), "image_tokens": condition.image_tokens})
    other = Condition(**{**vars(other), "image_pooled": condition.image_pooled}).keep(text=False, image=True)
    assert torch.allclose(denoiser(x, t, without), denoiser(x, t, other), atol=1e-5)
    assert not torch.allclose(denoiser(x, t, without), base, atol=1e-3)


@torch.no_grad()
def test_zeros_for_what_is_absent_do_not_depend_on_the_batch():
    """Shap-E's way of leaving a condition out, with text tokens beside it: padding stays hidden."""
    torch.manual_seed(0)
    sizes = {"text_width": 12, "image_width": 20, "pooled_width": 6, "max_text_tokens": 5}
    model = Denoiser(16, 8, width=32, heads=2, layers=1, absent="zeros", **sizes).eval()
    torch.nn.init.normal_(model.latent_out.weight)
    x, t, condition = torch.randn(3, 16, 8), torch.rand(3), make_condition()
    condition = Condition(**{**vars(condition), "has_text": torch.tensor([True, True, False])})
    together = model(x, t, condition)
    cut = {name: value[1:] for name, value in vars(condition).items() if value is not None}
    cut |= {"text_tokens": cut["text_tokens"][:, :2], "text_mask": cut["text_mask"][:, :2]}
    assert torch.allclose(model(x[1:], t[1:], Condition(**cut)), together[1:], atol=1e-5)


def test_guidance_is_the_sum_written_in_its_docstring(denoiser):
    x, t, condition = torch.randn(3, 16, 8), torch.rand(3), make_condition()
    nothing = denoiser(x, t, condition.keep(text=False, image=False))
    image = denoiser(x, t, condition.keep(text=False, image=True))
    both = denoiser(x, t, condition)
    expected = nothing + 2.0 * (image - nothing) + 3.0 * (both - image)
    got = guided(denoiser, condition, text_scale=3.0, image_scale=2.0)(x, t)
    assert torch.allclose(got, expected, atol=1e-4)  # all channels, not the first three
    text_only = make_condition(image=False)
    text = denoiser(x, t, text_only)
    null = denoiser(x, t, text_only.keep(text=False, image=False))
    got = guided(denoiser, text_only, text_scale=4.0, image_scale=9.0)(x, t)
    assert torch.allclose(got, null + 4.0 * (text - null), atol=1e-4)
    assert torch.allclose(guided(denoiser, text_only, text_scale=1.0, image_scale=1.0)(x, t), text, atol=1e-5)


def test_sampling_a_gaussian_with_known_velocity_recovers_it():
    """For data N(m, s²) the flow's velocity is known; Euler's error falls with the steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    mean, std = 1.5, 0.4
    noise = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0))

    def velocity(x, t):
        t = t[:, None, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        centred = x - (1 - t) * mean
        return t * centred / variance - (mean + (1 - t) * std**2 * centred / variance)

    errors = []
    for steps in (8, 64):
        x = sample_latents(velocity, noise, FlowMatchEulerDiscreteScheduler(1000), steps=steps)
        errors.append(abs(x.mean().item() - mean) + abs(x.std().item() - std))
    assert errors[1] < 0.05 and errors[1] < errors[0]


def test_timestep_embedding_tells_levels_apart():
    e = timestep_embedding(torch.tensor([0.0, 0.5, 1.0]), 32)
    assert e.shape == (3, 32) and torch.allclose(e[0, :16], torch.ones(16))
    assert torch.cdist(e, e)[0, 1] > 1


def test_weights_hash_sees_values_and_names(autoencoder):
    before = weights_hash(autoencoder)
    assert before == weights_hash(autoencoder)
    with torch.no_grad():
        autoencoder.decoder.positions[0, 0] += 1e-3
    assert weights_hash(autoencoder) != before
    with torch.no_grad():
        autoencoder.decoder.positions[0, 0] -= 1e-3
