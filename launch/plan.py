"""`shapeloom plan`: what a training of the denoiser will take, in memory, operations and time, before it is started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import load_config, preset_path, read_settings_file
from ..errors import UserError
from ..training.arithmetic import Flops, Memory, StepMemory, denoiser_flops, memory_per_rank, step_memory
from ..training.autoencoder import AutoencoderModelConfig
from ..training.clip import ClipModelConfig
from ..training.denoiser import DenoiserRun
from ..training.encode import EncodeRun
from .launch_file import LaunchFile, read_launch_file

__all__ = ["Plan", "make_plan", "show"]

CLIP = "ViT-L-14-quickgelu"  # what encodes where a preset trains no CLIP of its own


@dataclass(frozen=True)
class Features:
    """Sizes of a latent sample; text_tokens is the longest caption, n_captions and n_views are those stored."""

    n_latents: int
    channels: int
    text_width: int
    image_width: int
    pooled_width: int
    text_tokens: int
    image_tokens: int
    n_captions: int
    n_views: int

    @property
    def stored_bytes(self) -> int:
        """Of one sample in a latent shard, which is float16 and read whole."""
        text = self.n_captions * (self.text_tokens * self.text_width + self.pooled_width)
        image = self.n_views * (self.image_tokens * self.image_width + self.pooled_width)
        return 2 * (self.n_latents * self.channels + text + image)


@dataclass(frozen=True)
class Plan:
    """samples: trained on in all; device_tflops: what a device does a second, 0 where nobody said.

    libraries: bytes that interpreter and libraries hold in a process; it counts where ranks run on the CPU.
    """

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
    libraries: int

    @property
    def flops_per_step(self) -> int:
        return self.run.batch_size * self.flops.training(checkpointing=self.run.gradient_checkpointing)

    @property
    def step_seconds(self) -> float | None:
        if not self.device_tflops:
            return None
        return self.flops_per_step / (self.ranks * self.device_tflops * 1e12)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; memory in bytes of one rank."""
        run, seconds = self.run, self.step_seconds
        per_second = run.batch_size / seconds if seconds else None
        return {
            "layout": self.launch.layout,
            "ranks": self.ranks,
            "parameters": self.step.sizes.parameters,
            "device": self.memory.device,
            "device_total": self.memory.device_total,
            "host": self.memory.host | ({"libraries": self.libraries} if self.launch.cpu or run.cpu else {}),
            "batch_size": run.batch_size,
            "batch_per_rank": run.batch_size // self.ranks,
            "accumulate": run.accumulate,
            "sequence": self.sequence,
            "tokens_per_step": run.batch_size * self.sequence,
            "flops_per_step": self.flops_per_step,
            "model_flops_per_sample": self.flops.training(),
            "stored_bytes_per_sample": self.features.stored_bytes,
            "state_bytes": 4 * (self.step.sizes.parameters + 3 * self.step.sizes.trained),
            "samples": self.samples,
            "step_s": seconds,
            "total_s": self.samples / per_second if per_second else None,
            "read_bytes_per_s": per_second * self.features.stored_bytes if per_second else None,
        }


def make_plan(
    preset: str,
    accelerate: Path,
    *,
    stage: str = "denoiser",
    ranks: int | None = None,
    device_tflops: float = 0.0,
    samples: int | None = None,
    overrides: list[str] | None = None,
) -> Plan:
    """Raises UserError for files that will not do, counts that do not divide, and settings that contradict each other.

    Args:
        ranks: in place of the file's num_processes.
        samples: to train on; else steps times batch_size of the run.
    """
    name, _, section = preset.partition(":")
    if stage != "denoiser":
        raise UserError(f"plan counts the denoiser alone, not '{stage}'")
    libraries = resident_bytes()
    run = load_config(DenoiserRun, name, section or stage, overrides=overrides or [])
    file = read_launch_file(accelerate)
    n = ranks or file.processes
    check(run, file, n)
    features = features_of(name)
    widths = ("n_latents", "channels", "text_width", "image_width", "pooled_width")
    settings = {key: getattr(features, key) for key in widths} | run.model.model_dump()
    tokens = {"text_tokens": features.text_tokens, "image_tokens": features.image_tokens}
    try:
        step = step_memory(
            settings,
            batch=run.batch_size // n // run.accumulate,
            checkpointing=run.gradient_checkpointing,
            precision=run.precision,
            parts=run.accumulate,
            gradients_stay=file.layout in ("one", "ddp", "zero1"),
            weights_cast=file.layout == "fsdp2",
            **tokens,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    offload = {"offload_optimiser": file.offload_optimiser, "offload_weights": file.offload_weights}
    memory = memory_per_rank(step, file.layout, n, precision=run.precision, reshard=file.reshard, **offload)
    prefix = {"text_pooled": 1, "image_pooled": 1, **tokens}
    return Plan(
        run=run,
        launch=file,
        ranks=n,
        features=features,
        step=step,
        memory=memory,
        flops=denoiser_flops(settings, **tokens),
        sequence=1 + sum(prefix[c] for c in run.model.conditions) + features.n_latents // run.model.patch,
        samples=samples or run.steps * run.batch_size,
        device_tflops=device_tflops,
        libraries=libraries,
    )


def check(run: DenoiserRun, file: LaunchFile, ranks: int) -> None:
    """What `training.launch` would refuse, and what it cannot see before ranks are started."""
    cpu = run.cpu or file.cpu
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
    if run.precision == "fp16" and (cpu or file.layout.startswith("zero")):
        raise UserError(f"precision=fp16 is not for {'a CPU' if cpu else 'DeepSpeed'}: take bf16")
    if run.init or run.lora.rank:
        raise UserError("plan counts a training of all weights from nothing: leave init and lora.rank out")


def features_of(preset: str) -> Features:
    """As the preset's own autoencoder, CLIP and encoding make them."""
    sections = read_settings_file(preset_path(preset), "preset")
    model = sections.get("autoencoder", {}).get("model", {})
    autoencoder = AutoencoderModelConfig(**{k: v for k, v in model.items() if k in ("n_latents", "channels")})
    encode = load_config(EncodeRun, preset, "encode") if "encode" in sections else EncodeRun()
    if "clip" in sections:
        clip = ClipModelConfig(**sections["clip"].get("model", {}))
        text = {"width": clip.text_width, "context_length": clip.context_length}
        towers: dict[str, Any] = {"embed_dim": clip.embed_dim, "vision_cfg": clip.vision_cfg, "text_cfg": text}
    else:
        import open_clip

        towers = open_clip.get_model_config(CLIP)
    width, tokens = grid_of(towers["vision_cfg"])
    return Features(
        n_latents=autoencoder.n_latents,
        channels=autoencoder.channels,
        text_width=towers["text_cfg"]["width"],
        image_width=width,
        pooled_width=towers["embed_dim"],
        text_tokens=towers["text_cfg"].get("context_length", 77),
        image_tokens=tokens,
        n_captions=encode.n_captions,
        n_views=encode.n_views,
    )


def grid_of(vision: dict[str, Any]) -> tuple[int, int]:
    """Width and number of the tokens of open_clip's image towers: a ResNet's last grid, a ViT's patches."""
    size, layers = vision.get("image_size", 224), vision.get("layers", 12)
    if "timm_model_name" in vision:
        raise UserError(f"plan does not know the image tokens of {vision['timm_model_name']}")
    if isinstance(layers, int):
        return vision.get("width", 768), (size // vision.get("patch_size", 16)) ** 2
    return 32 * vision.get("width", 64), (size // 32) ** 2


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
    run, facts = plan.run, plan.to_dict()
    cpu = plan.launch.cpu or run.cpu
    yield "layout", f"{plan.launch.layout}, {plan.ranks} rank{'s' * (plan.ranks > 1)} ({plan.launch.path.name})"
    yield "parameters", f"{plan.step.sizes.parameters:,}"
    yield "batch", f"{run.batch_size}: {run.batch_size // plan.ranks} a rank, in {run.accumulate} part(s)"
    yield "tokens a step", f"{facts['tokens_per_step']:,} ({plan.sequence} a sample)"
    recomputed = ", blocks computed twice" if run.gradient_checkpointing else ""
    yield "operations a step", f"{plan.flops_per_step / 1e12:,.3f} TFLOP{recomputed}"
    yield f"memory of a rank, {'' if cpu else 'GPU, '}GB", ""
    for name, size in plan.memory.device.items():
        yield f"  {name}", f"{size / 1e9:9.3f}"
    if cpu:
        yield "  libraries", f"{plan.libraries / 1e9:9.3f}"
    yield "  in all", f"{(plan.memory.device_total + (plan.libraries if cpu else 0)) / 1e9:9.3f}"
    yield "beside it, host, GB", ""
    for name, size in plan.memory.host.items():
        yield f"  {name}", f"{size / 1e9:9.3f}"
    yield "a state on disk, GB", f"  {facts['state_bytes'] / 1e9:9.3f}"
    yield "a sample on disk, MB", f"  {plan.features.stored_bytes / 1e6:9.3f}"
    if facts["step_s"] is not None:
        yield "time of a step", f"{facts['step_s']:.3f} s at {plan.device_tflops:g} TFLOP/s a device"
        yield "latents read", f"{facts['read_bytes_per_s'] / 1e6:,.1f} MB/s by all ranks"
        yield f"time to {plan.samples:,} samples", duration(facts["total_s"])


def duration(seconds: float) -> str:
    """Such as 3.2 days."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
