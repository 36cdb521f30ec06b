"""`shapeloom plan`: what a training of the denoiser will take, in memory, operations and time, before it is started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from pydantic import BaseModel

from ..config import load_config, preset_path, read_settings_file
from ..data_pipes.latents import CACHE_BYTES
from ..errors import UserError
from ..models.autoencoder import Autoencoder
from ..training.arithmetic import (
    Flops,
    Memory,
    StepMemory,
    denoiser_flops,
    evaluation_memory,
    memory_per_rank,
    step_memory,
)
from ..training.autoencoder import AutoencoderRun
from ..training.clip import ClipRun
from ..training.curriculum import check_curriculum
from ..training.denoiser import DenoiserRun, check_objective
from ..training.encode import EncodeRun
from ..training.samples import CHUNK
from .launch_file import LaunchFile, read_launch_file

__all__ = ["Plan", "make_plan", "show"]

CLIP_NAME = "ViT-L-14-quickgelu"  # what encodes where a preset trains no CLIP of its own

AnyRun = TypeVar("AnyRun", bound=BaseModel)


@dataclass(frozen=True)
class Features:
    """Sizes of a latent sample; text_tokens is the longest caption, n_captions and n_views are those stored.

    cached: text and image features are stored; else they are computed of pictures, whose size is not known here.
    autoencoder, clip: numbers of their parameters; every rank loads them beside the denoiser.
    """

    n_latents: int
    channels: int
    text_width: int
    image_width: int
    pooled_width: int
    text_tokens: int
    image_tokens: int
    n_captions: int
    n_views: int
    cached: bool
    autoencoder: int
    clip: int

    @property
    def stored_bytes(self) -> int:
        """Of one sample in a latent shard, which is float16 and read whole; without pictures."""
        text = self.n_captions * (self.text_tokens * self.text_width + self.pooled_width)
        image = self.n_views * (self.image_tokens * self.image_width + self.pooled_width)
        return 2 * (self.n_latents * self.channels + (text + image if self.cached else 0))


@dataclass(frozen=True)
class Plan:
    """samples: trained on in all; device_tflops: what a device does a second in 1e12, 0 where nobody said."""

    run: DenoiserRun
    launch: LaunchFile
    ranks: int
    features: Features
    step: StepMemory
    memory: Memory
    flops: Flops
    sequence: int
    samples: int
    device_tflops: float

    @property
    def cpu(self) -> bool:
        """The ranks have no GPU: device and host memory are one."""
        return self.launch.cpu or self.run.cpu

    @property
    def flops_per_step(self) -> int:
        return self.run.batch_size * self.flops.training(checkpointing=self.run.gradient_checkpointing)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; memory in bytes of one rank."""
        run, sizes, seconds = self.run, self.step.sizes, None
        if self.device_tflops:
            seconds = self.flops_per_step / (self.ranks * self.device_tflops * 1e12)
        per_second = run.batch_size / seconds if seconds else None
        return {
            "layout": self.launch.layout,
            "ranks": self.ranks,
            "cpu": self.cpu,
            "parameters": sizes.parameters,
            "device": self.memory.device,
            "device_total": self.memory.device_total,
            "host": self.memory.host,
            "host_total": self.memory.host_total,
            "batch_size": run.batch_size,
            "batch_per_rank": run.batch_size // self.ranks,
            "accumulate": run.accumulate,
            "sequence": self.sequence,
            "tokens_per_step": run.batch_size * self.sequence,
            "flops_per_step": self.flops_per_step,
            "model_flops_per_sample": self.flops.training(),
            "stored_bytes_per_sample": self.features.stored_bytes,
            "state_bytes": 4 * (sizes.parameters + 3 * sizes.trained),
            "samples": self.samples,
            "step_s": seconds,
            "total_s": self.samples / per_second if per_second else None,
            "read_bytes_per_s": per_second * self.features.stored_bytes if per_second else None,
        }


def make_plan(
    preset: str,
    accelerate: Path,
    *,
    ranks: int | None = None,
    device_tflops: float = 0.0,
    samples: int | None = None,
    overrides: list[str] | None = None,
) -> Plan:
    """Raises UserError for files that will not do, counts that do not divide, and settings that contradict each other.

    Args:
        preset: as for a training: NAME, a file, or NAME:SECTION.
        ranks: in place of the file's num_processes.
        samples: to train on; else steps times batch_size of the run.
    """
    libraries = resident_bytes()
    name, _, section = preset.partition(":")
    run = load_config(DenoiserRun, name, section or "denoiser", overrides=overrides or [])
    file = read_launch_file(accelerate)
    ranks = ranks or file.processes
    check(run, file, ranks)
    features = features_of(name)
    check_curriculum(run.curriculum, features.n_latents, run.model.patch)
    samples = samples or run.steps * run.batch_size
    widths = ("n_latents", "channels", "text_width", "image_width", "pooled_width")
    settings = {key: getattr(features, key) for key in widths} | run.model.model_dump()
    tokens = {"text_tokens": features.text_tokens, "image_tokens": run.max_views * features.image_tokens}
    try:
        step = step_memory(
            settings,
            batch=run.batch_size // ranks // run.accumulate,
            checkpointing=run.gradient_checkpointing,
            precision=run.precision,
            parts=run.accumulate,
            gradients_stay=file.layout in ("one", "ddp", "zero1"),
            **tokens,
        )
        sampled = min(CHUNK, max(run.sheet_samples, run.score_samples))
        at_once = max(run.eval_samples, 3 * sampled)  # two guidances are three evaluations of a sample
        evaluation = evaluation_memory(settings, samples=at_once, **tokens)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    memory = memory_per_rank(
        step,
        file.layout,
        ranks,
        reshard=file.reshard,
        offload_optimiser=file.offload_optimiser,
        offload_weights=file.offload_weights,
        evaluation=evaluation,
    )
    # CLIP goes where it computes: the main rank's samples are scored by it, features that are not cached are its.
    on_gpu = not (run.cpu or file.cpu) and (run.score_samples or not features.cached)
    device = memory.device | ({"CLIP": 4 * features.clip} if on_gpu else {})
    beside = {
        "autoencoder and CLIP": 4 * (features.autoencoder + (0 if on_gpu else features.clip)),
        "samples kept": min(CACHE_BYTES, -(-samples // ranks) * features.stored_bytes),
        "libraries": libraries,
    }
    prefix = {"text_pooled": 1, "image_pooled": 1, **tokens}
    return Plan(
        run=run,
        launch=file,
        ranks=ranks,
        features=features,
        step=step,
        memory=Memory(device, memory.host | beside),
        flops=denoiser_flops(settings, **tokens),
        sequence=1 + sum(prefix[c] for c in run.model.conditions) + features.n_latents // run.model.patch,
        samples=samples,
        device_tflops=device_tflops,
    )


def check(run: DenoiserRun, file: LaunchFile, ranks: int) -> None:
    """What `training.launch` would refuse, and what it cannot see before ranks are started."""
    cpu = run.cpu or file.cpu
    check_objective(run)
    if file.layout == "one" and ranks > 1:
        raise UserError(f"{file.path} is for one process, not {ranks}: take ddp.yaml, fsdp2.yaml or zero2.yaml")
    if run.processes not in (None, ranks):
        raise UserError(f"the run says processes={run.processes}, the accelerate file {ranks}: make them the same")
    if run.batch_size % (ranks * run.accumulate):
        raise UserError(
            f"batch_size {run.batch_size} does not divide among {ranks} processes and {run.accumulate} accumulated "
            f"parts: make it a multiple of {ranks * run.accumulate}"
        )
    if file.precision not in ("no", run.precision):
        raise UserError(
            f"{file.path} says mixed_precision {file.precision}, the run precision={run.precision}: write 'no' there, "
            "the run's decides"
        )
    if cpu and file.layout == "fsdp2":
        raise UserError("FSDP needs GPUs (without them accelerate would train each rank on its own): take cpu2.yaml")
    if run.precision == "fp16" and (cpu or file.layout not in ("one", "ddp")):
        raise UserError(f"precision=fp16 is not for {'a CPU' if cpu else file.layout}: take bf16")
    if run.init or run.lora.rank:
        raise UserError("plan counts a training of all weights from nothing: leave init and lora.rank out")


def features_of(preset: str) -> Features:
    """As the preset's own autoencoder, CLIP and encoding make them: built, and CLIP run, on no device at all."""
    sections = read_settings_file(preset_path(preset), "preset")

    def settings(cls: type[AnyRun], section: str) -> AnyRun:
        return load_config(cls, preset, section) if section in sections else cls()

    encode, config = settings(EncodeRun, "encode"), get_model_config(CLIP_NAME)
    if "clip" in sections:
        own = settings(ClipRun, "clip").model
        text = {key: getattr(own, f"text_{key}") for key in ("width", "heads", "layers")}
        text |= {"context_length": own.context_length, "vocab_size": own.vocab_size}
        config = {"embed_dim": own.embed_dim, "vision_cfg": own.vision_cfg, "text_cfg": text}
    with torch.device("meta"), torch.no_grad():
        try:
            autoencoder = Autoencoder(**settings(AutoencoderRun, "autoencoder").model.model_dump())
            clip = CLIP(**config)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"preset {preset}: its autoencoder or CLIP cannot be built ({error})") from None
        size = config["vision_cfg"].get("image_size", 224)
        picture, ids = torch.zeros(1, 3, size, size), torch.zeros(1, clip.context_length, dtype=torch.long)
        out = clip.forward_intermediates(image=picture, text=ids, image_indices=1, text_indices=1)
    _, text_tokens, text_width = out["text_intermediates"][-1].shape
    _, image_width, *grid = out["image_intermediates"][-1].shape
    return Features(
        n_latents=autoencoder.config.n_latents,
        channels=autoencoder.config.channels,
        text_width=text_width,
        image_width=image_width,
        pooled_width=out["image_features"].shape[-1],
        text_tokens=text_tokens,
        image_tokens=grid[0] * grid[1],
        n_captions=encode.n_captions,
        n_views=encode.n_views,
        cached=encode.features == "cached",
        autoencoder=sum(p.numel() for p in autoencoder.parameters()),
        clip=sum(p.numel() for p in clip.parameters()),
    )


def resident_bytes() -> int:
    """Of this process, in which nothing but libraries is loaded yet; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


# --- in words --------------------------------------------------------------------------------------------------------


def show(plan: Plan) -> str:
    """The plan as a table."""
    return "\n".join(f"{name:<26}{value}".rstrip() for name, value in _lines(plan))


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    run, facts, memory = plan.run, plan.to_dict(), plan.memory
    yield "layout", f"{plan.launch.layout}, {plan.ranks} rank{'s' * (plan.ranks > 1)} ({plan.launch.path.name})"
    yield "parameters", f"{plan.step.sizes.parameters:,}"
    yield "batch", f"{run.batch_size}: {run.batch_size // plan.ranks} a rank, in {run.accumulate} part(s)"
    yield "tokens a step", f"{facts['tokens_per_step']:,} ({plan.sequence} a sample)"
    recomputed = ", blocks computed twice" if run.gradient_checkpointing else ""
    yield "operations a step", f"{plan.flops_per_step / 1e12:,.3f} TFLOP{recomputed}"
    if plan.cpu:
        yield from _sizes("memory of a rank", memory.device | memory.host)
    else:
        yield from _sizes("memory of a GPU", memory.device)
        yield from _sizes("host memory of a rank", memory.host)
    yield "a state on disk", f"{facts['state_bytes'] / 1e9:9.3f} GB"
    pictures = "" if plan.features.cached else " and its pictures"
    yield "a sample on disk", f"{plan.features.stored_bytes / 1e6:9.3f} MB{pictures}"
    if facts["step_s"] is not None:
        yield "time of a step", f"{facts['step_s']:9.3f} s at {plan.device_tflops:g} TFLOP/s a device"
        yield "latents read", f"{facts['read_bytes_per_s'] / 1e6:9,.1f} MB/s by all ranks{pictures}"
        yield f"time to {plan.samples:,} samples", f"  {duration(facts['total_s'])}"


def _sizes(title: str, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    yield title, f"{sum(sizes.values()) / 1e9:9.3f} GB"
    for name, size in sizes.items():
        yield f"  {name}", f"{size / 1e9:9.3f}"


def duration(seconds: float) -> str:
    """Such as 3.2 days."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
