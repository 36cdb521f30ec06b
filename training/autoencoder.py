"""Stage: the autoencoder, from raw shards, by point supervision.

accelerate launch -m shapeloom.training.autoencoder --preset tiny --data raw/ --out runs/autoencoder
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.folders import publish_model
from ..config import Config
from ..data_pipes.loader import Batches, RawDataset, RawSample
from ..models.autoencoder import Autoencoder
from ..models.mesh import extract_mesh
from .config import RunConfig
from .held_out import held_out_split
from .loop import Batch, Stage, fit
from .losses import color_loss, occupancy_loss, sdf_loss
from .sheets import picture, picture_of_points, write_sheet

__all__ = ["AutoencoderRun", "build", "run"]


class AutoencoderModelConfig(Config):
    """See `models.autoencoder.Autoencoder`."""

    n_latents: int = 32
    channels: int = 32
    width: int = 128
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    hidden: int = 64
    point_frequencies: int = 6
    field_frequencies: int = 6
    latent_noise: float = 0.1
    density_scale: float = 0.02


class AutoencoderLossConfig(Config):
    """Weights of the terms, and their lengths in object units (see `training.losses`)."""

    sdf: float = 1.0
    occupancy: float = 1.0
    color: float = 3.0
    latent: float = 0.05  # on the mean square before the tanh: keeps latents from piling up at ±1, where no flow can go
    truncation: float = 0.1
    sharpness: float = 0.02
    color_reach: float = 0.1


class AutoencoderRun(RunConfig):
    model: AutoencoderModelConfig = AutoencoderModelConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    n_surface: int = 512  # surface points the encoder sees in a step
    n_field: int = 1024  # field points supervised in a step
    eval_samples: int = 64
    sheet_samples: int = 16  # held-out assets shown beside their reconstructions at each evaluation; 0 for none


def run(config: AutoencoderRun, *, resume: str = "auto") -> None:
    """Train, then leave the EMA weights in `<out>/autoencoder`."""
    fit(config, build(config), resume=resume)


def build(config: AutoencoderRun) -> Stage:
    torch.manual_seed(config.seed)
    model = Autoencoder(**config.model.model_dump())
    train = RawDataset(config.data, split="train", parts=("surface", "field"))
    held_out = held_out_split(train)

    def collate(items: list[tuple[RawSample, np.random.Generator]]) -> Batch:
        return collate_points(items, config)

    def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        field, raw_BLC = model(batch["surface"], batch["noise"], batch["level"])
        values = field(batch["points"])
        terms = config.loss
        sdf_B = sdf_loss(values.sdf_BP, batch["sdf"], truncation=terms.truncation)
        occupancy_B = occupancy_loss(values.sdf_BP, batch["sdf"], sharpness=terms.sharpness)
        color_B = color_loss(values.rgb_BP3, batch["rgb"], batch["sdf"], reach=terms.color_reach)
        latent_B = raw_BLC.square().mean((1, 2))
        total_B = terms.sdf * sdf_B + terms.occupancy * occupancy_B + terms.color * color_B + terms.latent * latent_B
        metrics = {"sdf": sdf_B, "occupancy": occupancy_B, "color": color_B, "latent": latent_B}
        return total_B, {name: value.mean().detach() for name, value in metrics.items()}

    def look(ema: Autoencoder, step: int) -> dict[str, float]:
        sheet(ema, held_out, config.sheet_samples, Path(config.out) / "samples" / f"{step:08d}.png")
        return evaluate(ema, held_out, config.eval_samples)

    return Stage(
        name="autoencoder",
        model=model,
        loss=loss,
        batches=lambda rank, world: Batches(train, collate, config.batch_size, config.seed, rank, world),
        evaluate=look,
        publish=lambda ema: publish_model(ema, Path(config.out) / "autoencoder"),
    )


def collate_points(items: list[tuple[RawSample, np.random.Generator]], config: AutoencoderRun) -> Batch:
    """A batch of surface points to encode and field points to supervise, with the latent's noise."""
    rows: dict[str, list[Any]] = {name: [] for name in ("surface", "points", "sdf", "rgb", "noise", "level")}
    shape = (config.model.n_latents, config.model.channels)
    for sample, rng in items:
        n_surface, n_field = len(sample.stored["surface.xyz"]), len(sample.stored["field.sdf"])
        # With replacement: a few points twice cost less than a permutation of all of them.
        rows["surface"].append(surface_features(sample, rng.integers(n_surface, size=config.n_surface)))
        points, sdf, rgb = sample.pick_field(rng.integers(n_field, size=config.n_field))
        rows["points"].append(points)
        rows["sdf"].append(sdf)
        rows["rgb"].append(rgb)
        rows["noise"].append(rng.standard_normal(shape, np.float32))
        rows["level"].append(rng.random(dtype=np.float32))
    return {name: torch.from_numpy(np.stack(values).astype(np.float32, copy=False)) for name, values in rows.items()}


def surface_features(sample: RawSample, index: np.ndarray | slice = slice(None)) -> np.ndarray:
    """xyz, unit normal and sRGB of a sample's surface points, [N, 9] float32."""
    return np.concatenate(sample.pick_surface(index), axis=-1)


@torch.no_grad()
def evaluate(model: Autoencoder, dataset: RawDataset, count: int) -> dict[str, float]:
    """IoU at the uniform field points and colour error at surface points, over the first `count` held-out assets."""
    ious: list[float] = []
    colors: list[float] = []
    n_near = dataset.shards.manifest["settings"]["n_near"]
    for i in range(min(count, len(dataset))):
        sample = dataset[i]
        surface_1N9 = torch.from_numpy(surface_features(sample)[None, ::2]).to(model.device)
        field = model.decode(model.encode(surface_1N9))
        xyz, sdf, _ = sample.pick_field(slice(n_near, None))
        points_1P3 = torch.from_numpy(xyz[None]).to(model.device)
        inside = field(points_1P3).sdf_BP[0].cpu().numpy() < 0
        truth = sdf < 0
        ious.append((inside & truth).sum() / max((inside | truth).sum(), 1))
        rgb = field(surface_1N9[..., :3]).rgb_BP3[0].cpu().numpy()
        colors.append(float(np.abs(rgb - surface_1N9[0, :, 6:].cpu().numpy()).mean()))
    return {"iou": float(np.mean(ious)), "color": float(np.mean(colors))}


@torch.no_grad()
def sheet(model: Autoencoder, dataset: RawDataset, count: int, path: Path) -> None:
    """A picture of held-out surface points beside the meshes made of them."""
    images, captions = [], []
    for i in range(min(count, len(dataset))):
        sample = dataset[i]
        surface_1N9 = torch.from_numpy(surface_features(sample)[None, ::2]).to(model.device)
        mesh = extract_mesh(model.decode(model.encode(surface_1N9)), 32)[0]
        images += [picture_of_points(sample), picture(mesh)]
        captions += [sample.captions[0], "reconstruction"]
    if images:
        write_sheet(images, captions, path)


if __name__ == "__main__":
    from .stages import main

    main("autoencoder")
