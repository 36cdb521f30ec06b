"""PSNR against its closed form, SSIM against scikit-image, LPIPS against torchmetrics' own of the same weights."""

from __future__ import annotations

import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from shapeloom.errors import UserError
from shapeloom.eval.metrics import pictures
from shapeloom.eval.metrics.pictures import BACKBONES, available, open_lpips, psnr, ssim


def noisy_pair(count: int = 2, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Shapes on white, and the same with noise on a part of them."""
    rng = np.random.default_rng(0)
    images = np.full((count, size, size, 3), 255, np.uint8)
    images[:, 10:40, 8:30] = rng.integers(0, 255, (count, 1, 1, 3))
    noise = rng.normal(0, 12, images.shape) * (np.arange(size)[:, None, None] > 15)
    return images, np.clip(images + noise, 0, 255).astype(np.uint8)


def test_psnr_is_its_closed_form():
    images = np.full((2, 32, 32, 3), 100, np.uint8)
    assert psnr(images, images + 1) == pytest.approx([20 * np.log10(255)] * 2, abs=1e-3)  # 48.13 dB
    half = images.copy()
    half[0, :16] += 10  # half of the pixels by 10 levels: MSE 50 / 255^2
    assert psnr(images, half) == pytest.approx([10 * np.log10(255**2 / 50), 100.0], abs=1e-3)


def test_psnr_and_ssim_are_those_of_scikit_image():
    images, others = noisy_pair()
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    for place, (image, other) in enumerate(zip(images, others)):
        assert psnr(images, others)[place] == pytest.approx(peak_signal_noise_ratio(image, other), abs=1e-3)
        expected = structural_similarity(image, other, data_range=255, **settings)
        assert ssim(images, others)[place] == pytest.approx(expected, abs=1e-4) and 0.2 < expected < 0.95


def test_equal_pictures_are_as_near_as_can_be():
    images, _ = noisy_pair()
    assert psnr(images, images) == pytest.approx([100.0] * 2)
    assert ssim(images, images) == pytest.approx([1.0] * 2, abs=1e-4)


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A file of random weights where torchvision would have put SqueezeNet's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    path = tmp_path / "hub" / "checkpoints" / BACKBONES["squeeze"]
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    return path


def test_lpips_is_that_of_torchmetrics(backbone):
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    images, others = noisy_pair(count=20)  # more than a batch
    metric = open_lpips("squeeze")
    tensors = [torch.from_numpy(one).movedim(-1, 1) / 255 for one in (images, others)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = learned_perceptual_image_patch_similarity(*tensors, "squeeze", "none", normalize=True)
    np.testing.assert_allclose(metric(images, others), expected.numpy(), rtol=1e-4, atol=1e-6)
    assert metric(images, others).min() > 1e-4 and metric(images, images).max() == 0
    assert not metric.published


def test_lpips_without_its_network_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics, (note,) = available()
    assert list(metrics) == ["psnr", "ssim"] and not list(tmp_path.iterdir())
    assert "alexnet-owt-7be5be79.pth" in note and str(tmp_path / "hub" / "checkpoints") in note


def test_a_backbone_that_is_not_torchvisions_is_told(backbone):
    torch.manual_seed(0)
    features = torchvision.models.alexnet().features.state_dict()
    torch.save({f"features.{name}": value for name, value in features.items()}, backbone.with_name(BACKBONES["alex"]))
    metrics, (note,) = available()
    assert list(metrics) == ["psnr", "ssim", "lpips"] and "is not torchvision's" in note
    assert metrics["lpips"](*noisy_pair()).shape == (2,)


class Trap:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self):
        return sys.modules["builtins"].exec, ("raise SystemExit('the pickle ran')",)


@pytest.mark.parametrize("content", [b"", b"junk", "trap", {"features.0.weight": torch.zeros(1)}, [1, 2]])
def test_a_backbone_file_that_is_none(backbone, content):
    if content == "trap":
        content = pickle.dumps(Trap(), protocol=2)
    if isinstance(content, bytes):
        backbone.write_bytes(content)
    else:
        torch.save(content, backbone)
    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0.pth does not hold torchvision's weights"):
        open_lpips("squeeze")


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    images, others = noisy_pair()
    for metric in (psnr, ssim):
        with pytest.raises(UserError, match=r"need torchmetrics: pip install 'shapeloom\[eval\]'$"):
            metric(images, others)
    assert available() == ({}, ["PSNR, SSIM and LPIPS need torchmetrics: pip install 'shapeloom[eval]'"])


@pytest.mark.parametrize(
    ("images", "others"),
    [
        (np.zeros((1, 40, 40, 3), np.uint8), np.zeros((1, 40, 41, 3), np.uint8)),
        (np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8)),
        (np.zeros((1, 40, 40, 3), np.float32), np.zeros((1, 40, 40, 3), np.uint8)),
        (np.zeros((0, 40, 40, 3), np.uint8), np.zeros((0, 40, 40, 3), np.uint8)),
    ],
)
def test_pictures_that_do_not_pair_up(images, others):
    with pytest.raises(ValueError, match="pictures must be"):
        pictures.psnr(images, others)
