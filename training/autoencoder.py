"""Stage: the autoencoder, from raw shards: by points, by rendered rays, by rendered meshes (`training.field_losses`).

accelerate launch -m shapeloom.training.autoencoder --preset tiny --data raw/ --out runs/autoencoder
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.folders import load_model_folder, publish_model
from ..config import Config
from ..data_pipes.encoder_inputs import pick_rays, surface_features, view_arrays, view_targets
from ..data_pipes.fingerprint import data_fingerprint
from ..data_pipes.loader import RawDataset, RawSample
from ..errors import UserError
from ..models.autoencoder import Autoencoder, Bottleneck
from ..models.decoder import FieldKind
from ..models.encoder import PointFeatures
from ..models.mesh import extract_mesh
from .batch import stacked, view_inputs
from .field_losses import FieldLossConfig, field_loss
from .held_out import held_out_split
from .loop import Batch, Stage, fit
from .raw_data import RawRunConfig, raw_batches, training_data
from .sheets import picture, picture_of_points, write_sheet

__all__ = ["AutoencoderRun", "build", "run"]


class AutoencoderModelConfig(Config):
    """See `models.autoencoder.Autoencoder`."""

    n_latents: int = 32
    channels: int = 32
    width: int = 128
    heads: int = 4
    encoder_layers: int = 2
    point_features: PointFeatures = "normals"
    point_frequencies: int = 6
    n_centres: int = 0
    patch_size: int = 0
    norm_in: bool = False
    bottleneck: Bottleneck = "additive"
    latent_noise: float = 0.1
    decoder_width: int | None = 128
    decoder_layers: int = 2
    row_norm: bool = False
    field: FieldKind = "volsdf"
    hidden: int = 64
    field_frequencies: int = 6
    n_generated: int = 3
    n_shared: int = 1
    generated_bias: bool = True
    density_scale: float = 0.02


class AutoencoderRun(RawRunConfig):
    model: AutoencoderModelConfig = AutoencoderModelConfig()
    loss: FieldLossConfig = FieldLossConfig()
    init: str = ""  # an autoencoder folder to go on from, such as an earlier stage's; its settings win over `model`
    n_surface: int = 512  # surface points the encoder sees in a step; 0 for views alone
    n_views: int = 0  # views the encoder sees in a step
    n_field: int = 1024  # field points supervised in a step
    n_rays: int = 256  # pixels rendered in a step, where the loss has terms on rays
    n_coarse: int = 64  # samples a ray, and further ones where these found density
    n_fine: int = 128
    n_mesh_views: int = 1  # views of each rendered mesh, where the loss has that term
    mesh_resolution: int = 32  # lattice points an axis of those meshes
    eval_samples: int = 64
    sheet_samples: int = 16  # held-out assets shown beside their reconstructions at each evaluation; 0 for none


def run(config: AutoencoderRun, *, resume: str = "auto") -> None:
    """Train, then leave the EMA weights in `<out>/autoencoder`."""
    fit(config, build(config), resume=resume)


def build(config: AutoencoderRun) -> Stage:
    torch.manual_seed(config.seed)
    model = _model(config)
    train = training_data(config, _parts(config))
    held_out = held_out_split(train)

    def loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return field_loss(model, batch, config.loss, mesh_resolution=config.mesh_resolution)

    def look(ema: Autoencoder, step: int) -> dict[str, float]:
        sheet(ema, held_out, config, Path(config.out) / "samples" / f"{step:08d}.png")
        return evaluate(ema, held_out, config)

    return Stage(
        name="autoencoder",
        model=model,
        loss=loss,
        batches=raw_batches(config, train, lambda items: collate(items, config, model.config)),
        evaluate=look,
        publish=lambda ema: publish_model(ema, Path(config.out) / "autoencoder"),
        data=data_fingerprint(train),
    )


def _model(config: AutoencoderRun) -> Autoencoder:
    model = load_model_folder(Autoencoder, config.init) if config.init else Autoencoder(**config.model.model_dump())
    if model.encoder is None:
        raise UserError(f"init={config.init} came without an encoder: it cannot be trained as an autoencoder")
    if not config.n_surface and not config.n_views:
        raise UserError("n_surface and n_views are both 0: the encoder would see nothing")
    if config.n_views and not model.config.patch_size:
        raise UserError("n_views asks for views, but the model reads none: give it model.patch_size, such as 8")
    if config.n_surface and config.n_surface < model.config.n_centres:
        raise UserError(f"n_surface must be at least the model's n_centres, {model.config.n_centres}")
    # What would never get a gradient: ranks would wait for it.
    unread: tuple[str, ...] = () if config.n_surface else ("embed_points", "norm_points", "read_points", "point_conv")
    unread += () if config.n_views else ("embed_views", "norm_views", "read_views")
    for name in unread:
        if (part := getattr(model.encoder, name, None)) is not None:
            part.requires_grad_(False)
    return model.train()


def _parts(config: AutoencoderRun) -> tuple[str, ...]:
    """What must be read of the data."""
    parts = ["surface", "field"]
    if config.n_views or config.loss.on_rays or config.loss.mesh:
        parts += ["albedo", "cameras"]
    return (*parts, "depth") if config.n_views else tuple(parts)


def collate(items: list[tuple[RawSample, np.random.Generator]], config: AutoencoderRun, model: Any) -> Batch:
    """A batch of what the encoder sees, the latent's noise, and what the loss's terms are taken on.

    Args:
        model: the autoencoder's config.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ("points", "sdf", "rgb", "noise", "level")}
    surfaces, views, rays, meshes = [], [], [], []
    for sample, rng in items:
        n_surface, n_field = len(sample.stored["surface.xyz"]), len(sample.stored["field.sdf"])
        if config.n_surface:
            # With replacement: a few points twice cost less than a permutation of all of them.
            chosen = rng.integers(n_surface, size=config.n_surface)
            surfaces.append(surface_features(sample, chosen, n_centres=model.n_centres))
        points, sdf, rgb = sample.pick_field(rng.integers(n_field, size=config.n_field))
        rows["points"].append(points)
        rows["sdf"].append(sdf)
        rows["rgb"].append(rgb)
        rows["noise"].append(rng.standard_normal((model.n_latents, model.channels), np.float32))
        rows["level"].append(rng.random(dtype=np.float32))
        if config.n_views:
            views.append(view_arrays(sample, rng.permutation(len(sample.stored["albedo"]))[: config.n_views]))
        if config.loss.on_rays:
            shapes = {"coarse": config.n_coarse, "choice": config.n_fine, "place": config.n_fine}
            noise = {name: rng.random((config.n_rays, n), np.float32) for name, n in shapes.items()}
            rays.append(pick_rays(sample, config.n_rays, rng) | noise)
        if config.loss.mesh:
            meshes.append(view_targets(sample, rng.permutation(len(sample.stored["albedo"]))[: config.n_mesh_views]))
    batch = {name: torch.from_numpy(np.stack(values).astype(np.float32, copy=False)) for name, values in rows.items()}
    if surfaces:
        batch["surface"] = torch.from_numpy(np.stack(surfaces).astype(np.float32, copy=False))
    for name, arrays in (("views", views), ("rays", rays), ("mesh", meshes)):
        batch |= stacked(arrays, name) if arrays else {}
    return batch


def encode_whole(model: Autoencoder, sample: RawSample, config: AutoencoderRun) -> tuple[torch.Tensor, np.ndarray]:
    """A held-out asset's latent [1, L, C] from all that it has, and the surface points used [N, 9]."""
    surface_N9 = surface_features(sample, slice(None, None, 2), n_centres=model.config.n_centres)
    surface = torch.from_numpy(surface_N9[None]).to(model.device) if config.n_surface else None
    views = stacked([view_arrays(sample, slice(config.n_views))], "views") if config.n_views else {}
    return model.encode(surface, view_inputs({name: v.to(model.device) for name, v in views.items()})), surface_N9


@torch.no_grad()
def evaluate(model: Autoencoder, dataset: RawDataset, config: AutoencoderRun) -> dict[str, float]:
    """IoU at the uniform field points and colour error at surface points, over the first held-out assets."""
    ious: list[float] = []
    colors: list[float] = []
    n_near = dataset.shards.manifest["settings"]["n_near"]
    for i in range(min(config.eval_samples, len(dataset))):
        sample = dataset[i]
        z_1LC, surface_N9 = encode_whole(model, sample, config)
        field = model.decode(z_1LC)
        xyz, sdf, _ = sample.pick_field(slice(n_near, None))
        points_1P3 = torch.from_numpy(xyz[None]).to(model.device)
        inside = field(points_1P3).sdf_BP[0].cpu().numpy() < 0
        truth = sdf < 0
        ious.append((inside & truth).sum() / max((inside | truth).sum(), 1))
        rgb = field(torch.from_numpy(surface_N9[None, :, :3]).to(model.device)).rgb_BP3[0].cpu().numpy()
        colors.append(float(np.abs(rgb - surface_N9[:, 6:]).mean()))
    return {"iou": float(np.mean(ious)), "color": float(np.mean(colors))}


@torch.no_grad()
def sheet(model: Autoencoder, dataset: RawDataset, config: AutoencoderRun, path: Path) -> None:
    """A picture of held-out surface points beside the meshes made of them."""
    images, captions = [], []
    for i in range(min(config.sheet_samples, len(dataset))):
        sample = dataset[i]
        mesh = extract_mesh(model.decode(encode_whole(model, sample, config)[0]), 32)[0]
        images += [picture_of_points(sample), picture(mesh)]
        captions += [sample.captions[0], "reconstruction"]
    if images:
        write_sheet(images, captions, path)


if __name__ == "__main__":
    from .stages import main

    main("autoencoder")
