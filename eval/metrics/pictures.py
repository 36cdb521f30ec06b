"""How near two pictures are: PSNR, SSIM, and LPIPS where its network lies on this disk.

All take u8 sRGB pictures, the same number and size on both sides, and give one value a pair; the mean over views, then
over objects, is the caller's. The numbers depend on how much of the picture is background, which is equal on both
sides: they compare only between runs with the same cameras, size and background. They need the extra `[eval]`.

Shapes: N pictures, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ...errors import UserError
from ...files import sha256_file

__all__ = ["DEFINITIONS", "SMALLEST", "Lpips", "PictureMetric", "available", "open_lpips", "psnr", "ssim"]

PictureMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]

SMALLEST = 32  # pixels of a side: below, LPIPS's network has nothing left to look at
HIGHEST_PSNR = 100.0  # what identical pictures count as, in dB: the mean over views must stay a number
SSIM_SIGMA, SSIM_MARGIN = 1.5, 5  # pixels; the margin is half a window of 11
LPIPS_BATCH = 16
BACKBONES = {  # torchvision's files; the digits are the start of their sha256
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
DEFINITIONS = {
    "psnr": f"10 log10(1 / mean squared sRGB error), dB, mean over views; identical views count as {HIGHEST_PSNR:g}",
    "ssim": "Wang et al. 2004: Gaussian window of sigma 1.5 and 11 pixels, data range 1, mean over the channels and "
    "the windows within the picture, mean over views",
    "lpips": "Zhang et al. 2018, version 0.1, AlexNet, mean over views; lower is nearer",
}


def psnr(images_NHW3: np.ndarray, others_NHW3: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in dB, [N]: 10 log10(1 / MSE) of sRGB in [0, 1], at most 100.

    Raises: UserError without torchmetrics; ValueError for pictures that do not pair up.
    Example: pictures that differ by one level of 255 everywhere have 48.13.
    """
    _require("torchmetrics")
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pair = _tensors(images_NHW3, others_NHW3)
    values_N = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(*pair, strict=True)]
    return torch.stack(values_N).clamp(max=HIGHEST_PSNR).numpy()


def ssim(images_NHW3: np.ndarray, others_NHW3: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair, [N], at most 1 (Wang et al. 2004): Gaussian windows of sigma 1.5 pixels, 11
    wide, k1 .01, k2 .03, data range 1, population variances; mean over channels and the windows within the picture.

    As `skimage.metrics.structural_similarity(gaussian_weights=True, use_sample_covariance=False)`. (torchmetrics' own
    mean also counts windows that reach over the edge.)

    Raises: as `psnr`.
    """
    _require("torchmetrics")
    from torchmetrics.functional.image import structural_similarity_index_measure

    # float32 is right to 1e-4, which the rounding of flat areas' variances costs; float64 takes 14 times as long.
    a_N3HW, b_N3HW = _tensors(images_NHW3, others_NHW3)
    _, map_N3HW = structural_similarity_index_measure(
        a_N3HW, b_N3HW, sigma=SSIM_SIGMA, data_range=1.0, reduction="none", return_full_image=True
    )
    inner = slice(SSIM_MARGIN, -SSIM_MARGIN)
    return map_N3HW[..., inner, inner].mean(dim=(1, 2, 3)).numpy()


@dataclass(frozen=True)
class Lpips:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1) of each pair of pictures, [N].

    Args:
        sha256: of the backbone's file.
        published: whether that is torchvision's; the numbers of another one compare with nothing.
    """

    network: torch.nn.Module
    sha256: str
    published: bool

    @torch.inference_mode()
    def __call__(self, images_NHW3: np.ndarray, others_NHW3: np.ndarray) -> np.ndarray:
        pair = (tensor.split(LPIPS_BATCH) for tensor in _tensors(images_NHW3, others_NHW3))
        parts = [self.network(a, b, normalize=True) for a, b in zip(*pair, strict=True)]
        return torch.cat(parts).reshape(-1).numpy()


def open_lpips(backbone: str = "alex") -> Lpips:
    """LPIPS with a backbone whose weights lie where torchvision would have put them; nothing is downloaded.

    Args:
        backbone: "alex" (what papers mean without saying so), "vgg" or "squeeze".
    Raises: UserError with the file's name and folder if it is not there, or is no plain dictionary of weights that
        fit; and without the package lpips.
    """
    _require("lpips")
    import lpips

    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[backbone]
    if not path.is_file():
        raise UserError(f"LPIPS needs the weights of its network: put torchvision's {path.name} into {path.parent}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision in an old way
        network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # "slice2.3.weight" there is "features.3.weight" here.
        own = {name: weights[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(own)
    except Exception:  # torch raises whatever its reader meets in a damaged or hostile file
        raise UserError(f"{path} does not hold torchvision's weights: copy or download it again") from None
    sha256 = sha256_file(path)
    return Lpips(network.eval(), sha256, sha256.startswith(path.stem.rpartition("-")[2]))


def available() -> tuple[dict[str, PictureMetric], list[str]]:
    """The measures that can be taken here, by name, and a sentence on each that cannot."""
    try:
        _require("torchmetrics")
    except UserError as error:
        return {}, [str(error)]
    metrics: dict[str, PictureMetric] = {"psnr": psnr, "ssim": ssim}
    try:
        lpips = open_lpips()
    except UserError as error:
        return metrics, [str(error)]
    note = f"the LPIPS network is not torchvision's (sha256 {lpips.sha256[:16]}): its numbers compare with nothing"
    return {**metrics, "lpips": lpips}, [] if lpips.published else [note]


def _require(package: str) -> None:
    try:
        found = find_spec(package) is not None
    except ValueError:  # it stands in sys.modules as missing
        found = False
    if not found:
        raise UserError(f"PSNR, SSIM and LPIPS need {package}: pip install 'shapeloom[eval]'")


def _tensors(images_NHW3: np.ndarray, others_NHW3: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides as f32 [N, 3, H, W] in [0, 1]."""
    shape = images_NHW3.shape
    if shape != others_NHW3.shape or len(shape) != 4 or shape[0] == 0 or shape[3] != 3 or min(shape[1:3]) < SMALLEST:
        raise ValueError(
            f"pictures must be [N, H, W, 3] on both sides and at least {SMALLEST} pixels a side, "
            f"got {list(shape)} and {list(others_NHW3.shape)}"
        )
    if images_NHW3.dtype != np.uint8 or others_NHW3.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8, got {images_NHW3.dtype} and {others_NHW3.dtype}")
    a, b = (torch.from_numpy(np.ascontiguousarray(one)).movedim(-1, 1) / 255 for one in (images_NHW3, others_NHW3))
    return a, b
