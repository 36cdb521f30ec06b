"""What a sample sees of its conditions: the drop as a function of (seed, uid, epoch), and several views as a set."""

import hashlib
from itertools import permutations

import numpy as np
import pytest
import torch
from latent_folders import CAPTIONS, C, L, four_latents, small_autoencoder, small_clip, write_latents
from PIL import Image

from shapeloom.data_pipes.latents import LatentSample
from shapeloom.data_pipes.loader import order
from shapeloom.errors import UserError
from shapeloom.eval.generate import sample
from shapeloom.models.denoiser import Condition, Denoiser
from shapeloom.models.guidance import guided, shap_e_scheduler
from shapeloom.models.hashing import weights_hash
from shapeloom.models.pipeline import ShapeloomPipeline
from shapeloom.training.conditioning import ConditioningConfig, choose_views, conditions_seen, image_features
from shapeloom.training.denoiser import DenoiserRun, build

SHARES = {"text": 0.5, "image": 0.2, "both": 0.2, "nothing": 0.1}
SIZES = {"width": 32, "heads": 2, "layers": 2, "text_width": 12, "image_width": 20, "pooled_width": 6}


# --- dropping --------------------------------------------------------------------------------------------------------


def test_shares_are_as_configured_over_assets_and_over_epochs():
    for many in (
        [conditions_seen(3, f"uid-{i}", 0, SHARES) for i in range(20_000)],
        [conditions_seen(3, "uid", epoch, SHARES) for epoch in range(20_000)],
        [conditions_seen(seed, "uid", 0, SHARES) for seed in range(20_000)],
    ):
        found = {mode: many.count(mode) / len(many) for mode in set(many)}
        names = {(True, False): "text", (False, True): "image", (True, True): "both", (False, False): "nothing"}
        for mode, share in found.items():
            assert share == pytest.approx(SHARES[names[mode]], abs=0.015)  # 4 standard deviations


def test_the_decision_is_written_down_and_the_same_on_every_machine():
    """By hand: the first 8 bytes of BLAKE2b, as a number in [0, 1), against the cumulated shares."""
    for uid, epoch in (("a", 0), ("a", 1), ("ünïcode", 2)):
        number = int(hashlib.blake2b(f"7/{epoch}/{uid}".encode(), digest_size=8).hexdigest(), 16) / 2**64
        mode = "text" if number < 0.5 else "image" if number < 0.7 else "both" if number < 0.9 else "nothing"
        assert conditions_seen(7, uid, epoch, SHARES) == (mode in ("text", "both"), mode in ("image", "both"))
    assert all(conditions_seen(0, str(i), 0, {"text": 1, "image": 0, "both": 0, "nothing": 0})[0] for i in range(500))


def test_independent_and_joint_chances_become_shares():
    chances = {"drop_text": 0.3, "drop_image": 0.4, "drop_both": 0.1}
    shares = ConditioningConfig(**chances).shares()
    assert shares == pytest.approx({"both": 0.9 * 0.7 * 0.6, "text": 0.9 * 0.7 * 0.4, "image": 0.9 * 0.3 * 0.6,
                                    "nothing": 0.1 + 0.9 * 0.3 * 0.4})  # fmt: skip
    rng = np.random.default_rng(0)
    both = rng.random(100_000) < 0.1
    text, image = (~both & (rng.random(100_000) >= p) for p in (0.3, 0.4))
    assert (text & image).mean() == pytest.approx(shares["both"], abs=0.01)
    assert (text & ~image).mean() == pytest.approx(shares["text"], abs=0.01)
    assert ConditioningConfig(drop_both=0.2).shares()["both"] == pytest.approx(0.8)
    assert ConditioningConfig().shares() == {"text": 0.6, "image": 0.2, "both": 0.1, "nothing": 0.1}
    with pytest.raises(UserError, match="not some of each"):
        ConditioningConfig(text=0.7, image=0.1, drop_both=0.1).shares()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_latents(
        tmp_path_factory.mktemp("conditioning") / "latents", small_autoencoder(), small_clip(), four_latents()
    )


def seen_by_position(folder, *, batch_size: int, world: int, steps: int, start: int = 0, seed: int = 5) -> dict:
    """Position → what its sample saw, over all ranks, of batches iterated from `start` on."""
    config = DenoiserRun.model_validate(
        {"data": str(folder), "batch_size": batch_size, "seed": seed, "model": {"width": 24, "heads": 2, "layers": 1}}
    )
    stage, found = build(config), {}
    for rank in range(world):
        batches = stage.batches(rank, world)
        for step, batch in enumerate(batches.iterate(start, steps), start):
            for i, position in enumerate(batches.positions(step)):
                found[int(position)] = bool(batch["has_text"][i]), bool(batch["has_image"][i])
    return found


def test_neither_batch_size_nor_ranks_nor_a_restart_change_what_is_seen(folder):
    whole = seen_by_position(folder, batch_size=8, world=1, steps=12)
    assert seen_by_position(folder, batch_size=8, world=4, steps=12) == whole
    assert seen_by_position(folder, batch_size=24, world=2, steps=4) == whole
    late = seen_by_position(folder, batch_size=8, world=1, steps=12, start=7)
    assert late == {p: whole[p] for p in range(56, 96)}
    shares = ConditioningConfig().shares()
    assert whole == {p: conditions_seen(5, f"object-{order(4, 5, p)}", p // 4, shares) for p in range(96)}
    assert len(set(whole.values())) == 4
    assert seen_by_position(folder, batch_size=8, world=1, steps=12, seed=6) != whole


# --- views -----------------------------------------------------------------------------------------------------------


def test_every_count_of_views_is_as_likely_and_none_comes_twice():
    rng = np.random.default_rng(0)
    chosen = [choose_views(rng, 5, 3) for _ in range(6000)]
    assert all(len(set(views)) == len(views) for views in chosen)
    counts = np.bincount([len(views) for views in chosen])[1:] / 6000
    assert counts == pytest.approx([1 / 3] * 3, abs=0.03)
    places = np.bincount(np.concatenate(chosen), minlength=5)
    assert places / places.sum() == pytest.approx([0.2] * 5, abs=0.02)
    assert {len(choose_views(rng, 2, 9)) for _ in range(50)} == {1, 2}
    assert {int(choose_views(rng, 3, 1)[0]) for _ in range(50)} == {0, 1, 2}
    assert choose_views(rng, 0, 1).tolist() == [0]


def views_sample(n_views: int, seed: int) -> LatentSample:
    rng = np.random.default_rng(seed)
    tokens, pooled = rng.standard_normal((n_views, 4, 20)), rng.standard_normal((n_views, 6))
    nothing = np.zeros((0, 0, 0))
    return LatentSample(str(seed), np.zeros((16, 8)), nothing, np.zeros(0), np.zeros((0, 0)), tokens, pooled)


def condition_of_views(chosen: list[list[int]], samples: list[LatentSample], has_image: list[bool]) -> Condition:
    arrays = image_features(samples, [np.array(views) for views in chosen], {})
    count = len(samples)
    return Condition(
        text_tokens=torch.zeros(count, 1, 12),
        text_mask=torch.zeros(count, 1, dtype=torch.bool),
        text_pooled=torch.zeros(count, 6),
        has_text=torch.zeros(count, dtype=torch.bool),
        has_image=torch.tensor(has_image),
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
    )


@pytest.fixture(scope="module", params=["learned", "zeros"])
def model(request):
    torch.manual_seed(0)
    model = Denoiser(16, 8, absent=request.param, **SIZES).eval()
    torch.nn.init.normal_(model.latent_out.weight)
    return model


@torch.no_grad()
def test_views_are_a_set_and_their_padding_is_not_seen(model):
    samples = [views_sample(4, 1), views_sample(4, 2), views_sample(4, 3)]
    x, t = torch.randn(3, 16, 8), torch.rand(3)
    chosen, there = [[0, 1, 2], [3], [1, 2]], [True, True, False]
    together = model(x, t, condition_of_views(chosen, samples, there))
    for order_of_views in permutations([0, 1, 2]):
        turned = model(x, t, condition_of_views([list(order_of_views), [3], [2, 1]], samples, there))
        assert torch.allclose(turned, together, atol=1e-5)
    # Each alone, so with another number of views beside it: the one with one view takes the path without views.
    for i in range(3):
        alone = model(
            x[i : i + 1], t[i : i + 1], condition_of_views(chosen[i : i + 1], samples[i : i + 1], there[i : i + 1])
        )
        assert torch.allclose(alone[0], together[i], atol=1e-5), i
    one_less = model(x, t, condition_of_views([[0, 1], [3], [1, 2]], samples, there))
    assert not torch.allclose(one_less[0], together[0], atol=1e-2)
    assert torch.allclose(one_less[1:], together[1:], atol=1e-5)
    all_there = condition_of_views([[0, 1]] * 3, samples, [True] * 3)
    unmasked = Condition(**{**vars(all_there), "views": None})
    assert torch.allclose(model(x, t, all_there), model(x, t, unmasked), atol=1e-6)
    both = guided(model, all_there, text_scale=1.0, image_scale=2.0)(x, t)
    null = model(x, t, all_there.keep(text=False, image=False))
    assert torch.allclose(both, null + 2 * (model(x, t, all_there) - null), atol=1e-4)


def test_the_pooled_view_is_the_average():
    torch.manual_seed(0)
    model = Denoiser(16, 8, conditions=["image_pooled"], **SIZES).eval()
    torch.nn.init.normal_(model.latent_out.weight)
    sample, x, t = views_sample(3, 1), torch.randn(1, 16, 8), torch.rand(1)
    several = condition_of_views([[0, 2]], [sample], [True])
    mean = Condition(**{**vars(several), "image_pooled": several.image_pooled.mean(1), "views": None})
    with torch.no_grad():
        assert torch.allclose(model(x, t, several), model(x, t, mean), atol=1e-6)


@pytest.fixture(scope="module")
def pipeline():
    autoencoder, clip = small_autoencoder(), small_clip()
    torch.manual_seed(0)
    denoiser = Denoiser(
        L, C, width=32, heads=2, layers=2, text_width=32, image_width=256, pooled_width=24, prediction="sample",
        autoencoder_hash=weights_hash(autoencoder), conditioner_hash=clip.weights_hash,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(denoiser.latent_out.weight, std=0.05)
    return ShapeloomPipeline(autoencoder, denoiser, clip, shap_e_scheduler())


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8))


def test_the_pipeline_takes_views_in_any_order_and_number(pipeline):
    a, b, c = (picture(i) for i in range(3))
    options = {"steps": 3, "image_guidance": 2.0}
    z = pipeline.generate_latents(None, None, [0, 1], images=[[a, b, c], [b]], **options)
    turned = pipeline.generate_latents(None, None, [0, 1], images=[[c, a, b], [b]], **options)
    assert torch.allclose(z, turned, atol=1e-5)
    single = pipeline.generate_latents(None, [b], [1], **options)
    assert torch.allclose(single[0], z[1], atol=1e-5)
    assert not torch.allclose(pipeline.generate_latents(None, [a], [0], **options)[0], z[0], atol=1e-3)
    with_text = pipeline.generate_latents(CAPTIONS[:2], None, [0, 1], images=[[a, b, c], [b]], **options)
    assert not torch.allclose(with_text, z, atol=1e-3)
    out = pipeline(images=[[a, b]], seeds=[0], steps=1, resolution=8)
    assert out.latents.shape == (1, L, C)


def test_a_folder_of_views_is_sampled_as_a_set(pipeline, tmp_path, monkeypatch):
    """The whole way from files: the order of their names changes nothing, another view does."""
    decoded = []
    decode = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda z: decoded.append(z) or decode(z))
    for folder, seeds in {"ab": (0, 1), "ba": (1, 0), "a": (0,)}.items():
        (tmp_path / folder).mkdir()
        for i, seed in enumerate(seeds):
            picture(seed).save(tmp_path / folder / f"{i}.png")
    images = [tmp_path / "ab", tmp_path / "ba", tmp_path / "a", tmp_path / "a" / "0.png"]
    options = {"steps": 3, "resolution": 8, "guidance_interval": (0.2, 0.9), "guidance_rescale": 0.5}
    record = sample(pipeline, images=images, seeds=[0], out=tmp_path / "out", **options)
    ab, ba, a, alone = decoded[0]
    assert torch.allclose(ab, ba, atol=1e-5) and torch.allclose(a, alone, atol=1e-5)
    assert not torch.allclose(ab, a, atol=1e-3)
    ranges = [entry["sdf_range"] for entry in record["samples"]]
    assert ranges[0] == pytest.approx(ranges[1], abs=2e-4)
    given = {"images": [[picture(0), picture(1)]], "steps": 3}
    guidance = {"guidance_interval": (0.2, 0.9), "guidance_rescale": 0.5}
    assert torch.allclose(pipeline.generate_latents(None, None, [0], **given, **guidance)[0], ab, atol=1e-5)
    assert not torch.allclose(pipeline.generate_latents(None, None, [0], **given)[0], ab, atol=1e-3)


def test_wrong_views_are_refused(pipeline):
    with pytest.raises(ValueError, match="not both"):
        pipeline.generate_latents(None, [picture(0)], images=[[picture(0)]])
    with pytest.raises(ValueError, match="object 1 has no view"):
        pipeline.generate_latents(None, None, images=[[picture(0)], []])
    with pytest.raises(ValueError, match="side by side, got 2 texts, 1 images"):
        pipeline.generate_latents(CAPTIONS[:2], None, images=[[picture(0)]])
