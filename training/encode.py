"""Stage: raw shards through the trained autoencoder and CLIP into latent shards; on all ranks, restartable.

    accelerate launch -m shapeloom.training.encode --preset tiny --data raw/ --out latents/ \
        autoencoder=runs/autoencoder/autoencoder clip=runs/clip/clip

Shard k is rank k mod N's work, from the k-th `shard_size` raw samples. Ranks exchange nothing: each renames finished
shards into place, and what is not there is done at the next start. Rank 0 begins the folder, and writes the manifest
once all shards are there. So neither the number of ranks nor a kill changes a byte of what is written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from ..checkpoints.clip import load_clip
from ..checkpoints.folders import class_of, load_model_folder, publish_model
from ..checkpoints.pipeline import load_conditioner
from ..config import Config
from ..data_pipes.latents import LatentSums, encode_latent_sample
from ..data_pipes.loader import RawDataset, RawSample
from ..data_pipes.remote_shards import open_shards
from ..data_pipes.shards import (
    LATENT_FORMAT,
    MANIFEST,
    ShardInfo,
    ShardWriter,
    begin_folder,
    finished_shard,
    write_manifest,
)
from ..errors import UserError
from ..files import ASIDE, canonical_json, read_json, write_atomic, write_json
from ..models.autoencoder import Autoencoder
from ..models.hashing import weights_hash
from ..progress import track
from .encode_assets import Encoder, Shapes, common_shapes, cost
from .features import AnyConditioner, reads
from .launch import say
from .ranks import Ranks

__all__ = ["EncodeRun", "run"]

POLL_S = 0.5
NO_PART_OF_THE_BYTES = {"data", "out", "autoencoder", "clip", "cpu", "timeout_minutes"}


class EncodeRun(Config):
    data: str = ""
    out: str = ""
    autoencoder: str = ""  # folder of the trained autoencoder, or a pipeline's autoencoder/
    clip: str = ""  # the conditioner: folder or name of an open_clip model, or a pipeline's conditioner/
    # cached: the conditioner's features are stored. computed: captions and pictures are, and training computes what it
    # needs of them; for data whose features would not fit the disk.
    features: Literal["cached", "computed"] = "cached"
    n_surface: PositiveInt = 2048  # surface points encoded, the first of each sample
    n_posed_views: NonNegativeInt = 20  # views encoded beside them by an autoencoder that reads views, the first ones
    n_views: NonNegativeInt = 4  # views to condition on; 0 for none
    n_captions: NonNegativeInt = 4  # captions to condition on; 0 for none
    batch_size: PositiveInt = 32
    shard_size: PositiveInt = 512  # samples a shard; a restart loses at most one shard a rank
    timeout_minutes: float = Field(default=30.0, gt=0)  # rank 0 waits so long for a rank that writes nothing
    cpu: bool = False


@dataclass(frozen=True)
class Job:
    """All that a rank needs to make any shard of the folder."""

    config: EncodeRun
    data: RawDataset
    encoder: Encoder
    shapes: Shapes
    settings: dict[str, Any]

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def n_shards(self) -> int:
        return -(-len(self.data) // self.config.shard_size)

    def shard(self, k: int) -> Path:
        return self.out / f"shard-{k:05d}.tar"

    def part(self, k: int) -> Path:
        """What a shard adds to the folder's statistics, and which assets it left out."""
        return self.out / f"shard-{k:05d}.sums.json"

    def is_finished(self, k: int) -> bool:
        return self.part(k).is_file() and finished_shard(self.shard(k)) is not None


def run(config: EncodeRun, *, resume: str = "auto") -> None:
    """Write the latent folder `config.out`; `resume` is always automatic, finished shards are kept.

    Raises: UserError for models or data that do not fit, for an output folder of other latents, and on rank 0 when
        another rank stopped without finishing its share.
    """
    ranks = Ranks.here()
    job = prepare(config, ranks.device(config.cpu))
    claim(job, ranks)
    mine = [k for k in range(ranks.rank, job.n_shards, ranks.world) if not job.is_finished(k)]
    if ranks.rank == 0:
        say(cost(job.encoder, job.data, job.shapes, job.out))
    for k in track(mine, description="encode") if ranks.rank == 0 else mine:
        write_shard(job, k)
    if ranks.rank == 0:
        await_shards(job, ranks)
        say(finish(job))


# --- before the first shard ------------------------------------------------------------------------------------------


def prepare(config: EncodeRun, device: torch.device) -> Job:
    for name in ("autoencoder", "clip"):
        if not getattr(config, name):
            raise UserError(f"encode needs {name}=FOLDER, the {name} to encode with")
    autoencoder = load_encoder(config.autoencoder).to(device)
    conditioner = load_features(config.clip).to(device)
    encoder = Encoder(
        autoencoder,
        conditioner,
        features=config.features,
        n_surface=config.n_surface,
        n_posed_views=config.n_posed_views if autoencoder.config.patch_size else 0,
        n_captions=config.n_captions if reads(conditioner, "text") else 0,
        n_views=config.n_views if reads(conditioner, "image") else 0,
    )
    if not encoder.n_captions and not encoder.n_views:
        raise UserError(
            f"clip={config.clip}: with n_captions={config.n_captions} and n_views={config.n_views} there is "
            "nothing to condition on; raise the one that this conditioner reads"
        )
    shards = open_shards(config.data)
    if encoder.n_views and not shards.has("lit_"):
        raise UserError(
            f"{config.data} has no lit views to take image features of: build it with n_views=4, or encode with "
            "n_views=0 for text alone"
        )
    data = RawDataset(shards, parts=encoder.parts, cache_bytes=0)
    shapes = common_shapes(encoder, data)
    check_shapes(shapes, autoencoder, config)
    settings = {
        **config.model_dump(exclude=NO_PART_OF_THE_BYTES),
        "n_captions": encoder.n_captions,
        "n_views": encoder.n_views,
        "raw_hash": shards.hash,
        "autoencoder_hash": weights_hash(autoencoder),
        "conditioner_hash": conditioner.weights_hash,
    }
    return Job(config, data, encoder, shapes, settings)


def load_encoder(folder: str) -> Autoencoder:
    """An autoencoder that can encode. Raises UserError for one that came without its encoder."""
    autoencoder = load_model_folder(Autoencoder, folder)
    if autoencoder.encoder is None:
        raise UserError(
            f"autoencoder={folder} came without an encoder (as diffusers' folders do): import one from a release that "
            f"has it (transmitter.pt), or train an autoencoder"
        )
    return autoencoder


def load_features(source: str) -> AnyConditioner:
    """What the denoiser is conditioned by: see `EncodeRun.clip`."""
    folder = Path(source)
    return load_conditioner(folder) if class_of(folder) else load_clip(source)


def check_shapes(shapes: Shapes, autoencoder: Autoencoder, config: EncodeRun) -> None:
    """Refuse data that the autoencoder cannot read."""
    patch_size, n_centres = autoencoder.config.patch_size, autoencoder.config.n_centres
    if "unlit views" in shapes and any(side % patch_size for side in shapes["unlit views"][1:3]):
        height, width = shapes["unlit views"][1:3]
        raise UserError(
            f"{config.data}: its views of {height} x {width} pixels do not divide into the autoencoder's patches of "
            f"{patch_size}: build it with an image_size that does, or encode with n_posed_views=0"
        )
    n_points = shapes["surface points"][0]
    if n_points < n_centres:
        raise UserError(
            f"the autoencoder reads neighbourhoods of {n_centres} surface points, and there are {n_points}: "
            f"raise n_surface here and, if need be, where {config.data} was built"
        )


def claim(job: Job, ranks: Ranks) -> None:
    """Begin the folder, with the models that make it, or find that rank 0 did. Raises UserError if it is another's."""
    begin = partial(begin_folder, job.out, format=LATENT_FORMAT, settings=job.settings)
    if ranks.rank == 0:
        begin()
        for name, model in (("autoencoder", job.encoder.autoencoder), ("conditioner", job.encoder.conditioner)):
            if not (job.out / name).is_dir():
                publish_model(model, job.out / name)
        return
    until = time.monotonic() + job.config.timeout_minutes * 60
    while not (job.out / MANIFEST).is_file():
        if time.monotonic() > until:
            raise UserError(f"{job.out}: rank 0 has not begun the folder in {job.config.timeout_minutes:g} minutes")
        time.sleep(POLL_S)
    begin()


# --- a shard ---------------------------------------------------------------------------------------------------------


def write_shard(job: Job, k: int) -> None:
    """One shard and its part; a bad asset is left out, with the reason.

    A shard's batches are the same whichever rank makes it, so its bytes are too.
    """
    sums, rejected, samples = LatentSums(), [], 0
    with ShardWriter(job.shard(k)) as writer:
        for good, bad in batches(job, k):
            rejected += bad
            for sample, latent in zip(good, job.encoder(good)):
                if isinstance(latent, str):
                    rejected.append({"uid": sample.uid, "reason": latent, "hint": "look at its surface"})
                    continue
                kept = ("uid", "captions", "split", "category", "spec", "swaps", "view_dependent")
                meta = {name: sample.meta[name] for name in kept if name in sample.meta}
                writer.write(sample.uid, encode_latent_sample(latent, meta), meta["split"])
                samples += 1
                if meta["split"] == "train":
                    sums.add(latent.latent)
        # Before the shard is renamed into place: a finished shard always has its part.
        write_json(job.part(k), {**vars(sums), "samples": samples, "rejected": rejected})
    for row in rejected:
        print(f"encode: {row['uid']} is left out: {row['reason']}", flush=True)


def batches(job: Job, k: int) -> Iterator[tuple[list[RawSample], list[dict[str, str]]]]:
    """A shard's samples by batches, and the rows of those that cannot be read; a thread reads one batch ahead."""
    first, last = k * job.config.shard_size, min((k + 1) * job.config.shard_size, len(job.data))
    starts = range(first, last, job.config.batch_size)

    def read(start: int) -> tuple[list[RawSample], list[dict[str, str]]]:
        good, bad = [], []
        for i in range(start, min(start + job.config.batch_size, last)):
            sample, reason = job.encoder.read(job.data, i, job.shapes)
            if sample is not None:
                good.append(sample)
            else:
                bad.append({"uid": job.data.shards.uid(i), "reason": reason, "hint": "build it again"})
        return good, bad

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as thread:
        ahead = thread.submit(read, starts[0])
        for following in [*starts[1:], None]:
            ready = ahead.result()
            if following is not None:
                ahead = thread.submit(read, following)
            yield ready


# --- after the last --------------------------------------------------------------------------------------------------


def await_shards(job: Job, ranks: Ranks) -> None:
    """Wait for the other ranks' shards, as long as any of them writes.

    Raises: UserError naming the ranks that are missing, once none has written for `timeout_minutes`.
    """
    missing = [k for k in range(job.n_shards) if not job.is_finished(k)]
    before, since = None, time.monotonic()
    while missing:
        if (now := (missing, half_written(job.out))) != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > job.config.timeout_minutes * 60:
            lost = sorted({k % ranks.world for k in missing})
            raise UserError(
                f"{job.out}: {len(missing)} shards are missing, and {'rank' if len(lost) == 1 else 'ranks'} "
                f"{', '.join(map(str, lost))} wrote nothing for {job.config.timeout_minutes:g} minutes; run encode "
                "again, it goes on"
            )
        time.sleep(POLL_S)
        missing = [k for k in missing if not job.is_finished(k)]


def half_written(out: Path) -> dict[str, int]:
    """Bytes of the shards that are being written."""
    sizes = {}
    for path in out.glob(f"shard-*{ASIDE}*"):
        with contextlib.suppress(OSError):  # it was renamed meanwhile
            sizes[path.name] = path.stat().st_size
    return sizes


def finish(job: Job) -> str:
    """Merge the shards' sums into per-channel statistics and write the manifest; says what came of it."""
    shards: list[ShardInfo] = []
    rejected: list[dict[str, str]] = []
    sums = LatentSums()
    for k in range(job.n_shards):
        info, part = finished_shard(job.shard(k)), read_json(job.part(k), "latent sums")
        if info is None or info.samples != part["samples"]:
            raise UserError(f"{job.shard(k)} was changed while encode ran: delete it and run encode again, it goes on")
        rejected += part["rejected"]
        sums.merge(LatentSums(part["count"], part["total"], part["square"]))
        if info.samples:
            shards.append(info)
    why = f"; the first that was left out, {rejected[0]['uid']}, because {rejected[0]['reason']}" if rejected else ""
    if not sums.count:
        raise UserError(f"{job.out}: there is no training sample to take statistics from{why}")
    write_atomic(job.out / "rejected.jsonl", "".join(canonical_json(row) + "\n" for row in rejected))
    mean_C, std_C = sums.mean_std()
    counts = {"samples": sum(shard.samples for shard in shards), "rejected": len(rejected)}
    write_manifest(
        job.out,
        format=LATENT_FORMAT,
        settings=job.settings,
        shards=shards,
        counts=counts,
        extra={"latent_mean": mean_C, "latent_std": std_C},
    )
    left_out = f", {len(rejected)} left out (see {job.out / 'rejected.jsonl'})" if rejected else ""
    return f"encode: {counts['samples']:,} assets in {job.out}{left_out}"


if __name__ == "__main__":
    from .stages import main

    main("encode")
