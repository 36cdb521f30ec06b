"""Stage: raw shards through the trained autoencoder and CLIP into latent shards; on all ranks, restartable.

    accelerate launch -m shapeloom.training.encode --preset tiny --data raw/ --out latents/ \
        autoencoder=runs/autoencoder/autoencoder clip=runs/clip/clip
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..checkpoints.clip import load_clip
from ..checkpoints.folders import class_of, load_model_folder, publish_model
from ..checkpoints.pipeline import load_conditioner
from ..config import Config
from ..data_pipes.encoder_inputs import surface_features, view_arrays
from ..data_pipes.latents import LatentSample, encode_latent_sample
from ..data_pipes.loader import RawDataset, RawSample
from ..data_pipes.render import composite
from ..data_pipes.shards import LATENT_FORMAT, ShardInfo, ShardWriter, begin_folder, finished_shard, write_manifest
from ..errors import UserError
from ..files import read_json, write_atomic, write_json
from ..models.autoencoder import Autoencoder
from ..models.conditioner import Conditioner
from ..models.hashing import weights_hash
from ..models.transformers_clip import TransformersConditioner
from ..progress import track
from .batch import stacked, view_inputs

__all__ = ["EncodeRun", "run"]

AnyConditioner = Conditioner | TransformersConditioner


class EncodeRun(Config):
    data: str = ""
    out: str = ""
    autoencoder: str = ""  # folder of the trained autoencoder, or a pipeline's autoencoder/
    clip: str = ""  # the conditioner: folder or name of an open_clip model, or a pipeline's conditioner/
    n_surface: int = 2048  # surface points encoded, the first of each sample
    n_posed_views: int = 20  # views encoded beside them by an autoencoder that reads views, the first of each sample
    n_views: int = 4  # views whose image features are kept
    n_captions: int = 4  # captions whose text features are kept
    batch_size: int = 32
    shard_size: int = 512  # samples a shard; a restart loses at most one shard a rank
    cpu: bool = False


def run(config: EncodeRun, *, resume: str = "auto") -> None:
    """Write the latent folder `config.out`; `resume` is always automatic, finished shards are kept."""
    for name in ("autoencoder", "clip"):
        if not getattr(config, name):
            raise UserError(f"encode needs {name}=FOLDER, the {name} to encode with")
    accelerator = Accelerator(cpu=config.cpu or not torch.cuda.is_available())
    autoencoder = load_encoder(config.autoencoder).to(accelerator.device)
    conditioner = load_features(config.clip).to(accelerator.device)
    reads_views = bool(autoencoder.config.patch_size and config.n_posed_views)
    parts = ("surface", "lit", *(("albedo", "depth", "cameras") if reads_views else ()))
    data = RawDataset(config.data, parts=parts, cache_bytes=0)
    check_sample(data[0], autoencoder, config)
    out = Path(config.out)
    settings = {
        **config.model_dump(exclude={"data", "out", "autoencoder", "clip", "cpu"}),
        "raw_hash": data.shards.hash,
        "autoencoder_hash": weights_hash(autoencoder),
        "conditioner_hash": conditioner.weights_hash,
    }
    if accelerator.is_main_process:
        begin_folder(out, format=LATENT_FORMAT, settings=settings)
        publish_model(autoencoder, out / "autoencoder")
        publish_model(conditioner, out / "conditioner")
    accelerator.wait_for_everyone()
    n_shards = -(-len(data) // config.shard_size)
    mine = range(accelerator.process_index, n_shards, accelerator.num_processes)
    for k in track(mine, description="encode") if accelerator.is_main_process else mine:
        if finished_shard(out / f"shard-{k:05d}.tar") is None or not _sums_path(out, k).is_file():
            chunk = range(k * config.shard_size, min((k + 1) * config.shard_size, len(data)))
            write_shard(out, k, [data[i] for i in chunk], autoencoder, conditioner, config)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(out, n_shards, settings)
    accelerator.wait_for_everyone()


def load_encoder(folder: str) -> Autoencoder:
    """An autoencoder that can encode. Raises UserError for one that came without its encoder."""
    autoencoder = load_model_folder(Autoencoder, folder)
    if autoencoder.encoder is None:
        raise UserError(
            f"autoencoder={folder} came without an encoder (as diffusers' folders do): import one from a release that "
            f"has it (transmitter.pt), or train an autoencoder"
        )
    return autoencoder


def check_sample(sample: RawSample, autoencoder: Autoencoder, config: EncodeRun) -> None:
    """Refuse data that the autoencoder cannot read."""
    patch_size, n_centres = autoencoder.config.patch_size, autoencoder.config.n_centres
    if sample.albedo is not None and any(side % patch_size for side in sample.albedo.shape[1:3]):
        height, width = sample.albedo.shape[1:3]
        raise UserError(
            f"{config.data}: its views of {height} x {width} pixels do not divide into the autoencoder's patches of "
            f"{patch_size}: build it with an image_size that does, or encode with n_posed_views=0"
        )
    n_points = min(config.n_surface, len(sample.stored["surface.xyz"]))
    if n_points < n_centres:
        raise UserError(
            f"the autoencoder reads neighbourhoods of {n_centres} surface points, and there are {n_points}: "
            f"raise n_surface here and, if need be, where {config.data} was built"
        )


def load_features(source: str) -> AnyConditioner:
    """What the denoiser is conditioned by: see `EncodeRun.clip`."""
    folder = Path(source)
    return load_conditioner(folder) if class_of(folder) else load_clip(source)


def write_shard(
    out: Path,
    k: int,
    samples: list[RawSample],
    autoencoder: Autoencoder,
    conditioner: AnyConditioner,
    config: EncodeRun,
) -> None:
    """One shard and the sums its training latents add to the statistics. A bad asset is left out and reported."""
    total_C = np.zeros(autoencoder.config.channels)
    square_C, count, rejected = np.zeros_like(total_C), 0, []
    # A shard's batches are the same whichever rank makes it, so its bytes are too.
    latents = [
        latent
        for start in range(0, len(samples), config.batch_size)
        for latent in encode_batch(samples[start : start + config.batch_size], autoencoder, conditioner, config)
    ]
    with ShardWriter(out / f"shard-{k:05d}.tar") as writer:
        for sample, latent in zip(samples, latents, strict=True):
            if not np.isfinite(latent.latent).all():
                rejected.append(
                    {"uid": sample.uid, "reason": "its latent is not finite", "hint": "look at its surface"}
                )
                continue
            split = sample.meta["split"]
            kept = ("uid", "captions", "split", "category", "spec", "swaps", "view_dependent")
            meta = {name: sample.meta[name] for name in kept if name in sample.meta}
            writer.write(sample.uid, encode_latent_sample(latent, meta), split)
            if split == "train":
                total_C += latent.latent.sum(0, dtype=np.float64)
                square_C += np.square(latent.latent, dtype=np.float64).sum(0)
                count += len(latent.latent)
    sums = {"sum": total_C.tolist(), "square": square_C.tolist(), "count": count, "rejected": rejected}
    write_json(_sums_path(out, k), sums)


@torch.inference_mode()
def encode_batch(
    samples: list[RawSample], autoencoder: Autoencoder, conditioner: AnyConditioner, config: EncodeRun
) -> list[LatentSample]:
    """Latents and features of some assets, which may have different numbers of captions and views."""
    z_BLC = encode_assets(samples, autoencoder, config)
    texts = text_arrays([sample.captions[: config.n_captions] for sample in samples], conditioner)
    images = image_arrays([sample.stored["lit"][: config.n_views] for sample in samples], conditioner)
    return [
        LatentSample(uid=sample.uid, latent=z_LC, **text, **image)
        for sample, z_LC, text, image in zip(samples, z_BLC, texts, images, strict=True)
    ]


def encode_assets(samples: list[RawSample], autoencoder: Autoencoder, config: EncodeRun) -> np.ndarray:
    """Latents [B, L, C] of surface points and, where the autoencoder reads them, of posed views."""
    n_centres = autoencoder.config.n_centres
    surface_BN9 = np.stack([surface_features(s, slice(config.n_surface), n_centres=n_centres) for s in samples])
    views = {}
    if samples[0].albedo is not None:
        views = stacked([view_arrays(sample, slice(config.n_posed_views)) for sample in samples], "views")
    seen = view_inputs({name: value.to(autoencoder.device) for name, value in views.items()})
    return autoencoder.encode(torch.from_numpy(surface_BN9).to(autoencoder.device), seen).float().cpu().numpy()


def text_arrays(captions: list[list[str]], conditioner: AnyConditioner) -> list[dict[str, np.ndarray]]:
    """The text members of each sample; of no captions where there is no text tower."""
    if isinstance(conditioner, TransformersConditioner) and conditioner.text is None:
        nothing = {"text_tokens": np.zeros((0, 0, 0)), "text_lengths": np.zeros(0), "text_pooled": np.zeros((0, 0))}
        return [nothing] * len(captions)
    text = conditioner.encode_text([caption for row in captions for caption in row])
    arrays = {"text_tokens": text.tokens, "text_lengths": text.mask.sum(-1), "text_pooled": text.pooled}
    return per_sample(arrays, list(map(len, captions)))


def image_arrays(views: list[np.ndarray], conditioner: AnyConditioner) -> list[dict[str, np.ndarray]]:
    """The image members of each sample; of no views where there is no image tower."""
    if isinstance(conditioner, TransformersConditioner) and conditioner.vision is None:
        return [{"image_tokens": np.zeros((0, 0, 0)), "image_pooled": np.zeros((0, 0))}] * len(views)
    image = conditioner.encode_image(np.stack([composite(view) for of_sample in views for view in of_sample]))
    return per_sample({"image_tokens": image.tokens, "image_pooled": image.pooled}, list(map(len, views)))


def per_sample(arrays: dict[str, torch.Tensor], counts: list[int]) -> list[dict[str, np.ndarray]]:
    """Arrays over all captions (or views) cut into each sample's."""
    parts = {name: array.cpu().split(counts) for name, array in arrays.items()}
    return [{name: part[i].numpy() for name, part in parts.items()} for i in range(len(counts))]


def finish(out: Path, n_shards: int, settings: dict[str, Any]) -> None:
    """Merge the shards' sums into per-channel statistics and write the manifest."""
    shards: list[ShardInfo] = []
    parts: list[dict[str, Any]] = []
    for k in range(n_shards):
        info = finished_shard(out / f"shard-{k:05d}.tar")
        if info is None:
            raise UserError(f"{out}/shard-{k:05d}.tar was not finished by its rank; run encode again, it goes on")
        shards.append(info)
        parts.append(read_json(_sums_path(out, k), "latent sums"))
    count = sum(part["count"] for part in parts)
    if count == 0:
        raise UserError(f"{out}: there is no training sample to take statistics from")
    mean_C = np.sum([part["sum"] for part in parts], axis=0) / count
    variance_C = np.sum([part["square"] for part in parts], axis=0) / count - mean_C**2
    rejected = [row for part in parts for row in part["rejected"]]
    write_atomic(out / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rejected))
    statistics = {"latent_mean": mean_C.tolist(), "latent_std": np.sqrt(np.maximum(variance_C, 1e-8)).tolist()}
    counts = {"samples": sum(shard.samples for shard in shards), "rejected": len(rejected)}
    write_manifest(out, format=LATENT_FORMAT, settings=settings, shards=shards, counts=counts, extra=statistics)


def _sums_path(out: Path, k: int) -> Path:
    return out / f"shard-{k:05d}.sums.json"


if __name__ == "__main__":
    from .stages import main

    main("encode")
