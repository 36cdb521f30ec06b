"""From what a launcher started to an `Accelerator`, after checking that it is what the run's settings say."""

from __future__ import annotations

import datetime
import importlib.util
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from ..errors import UserError
from .config import RunConfig

__all__ = ["launch", "say"]


def say(text: str) -> None:
    """Tell the user something once, whatever the number of ranks; usable before there is an accelerator."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def launch(run: RunConfig, *, shardable: bool) -> Accelerator:
    """The accelerator. Raises UserError where launcher and settings contradict each other.

    Args:
        shardable: whether the stage's model is one module called as one, which FSDP2 and ZeRO-3 need.
    """
    cpu = run.cpu or not torch.cuda.is_available()
    sharding, zero = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    _check_before(run, cpu=cpu, sharding=sharding, zero=zero)
    handlers = []
    if zero or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        timeout = datetime.timedelta(minutes=run.timeout_minutes)
        handlers = [InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=timeout)]
    precision = "no" if zero else run.precision  # DeepSpeed does its own autocast
    accelerator = Accelerator(
        cpu=cpu and not zero,
        mixed_precision=precision,
        kwargs_handlers=handlers,
        # The loop accumulates; what the environment says is not for it, and "auto" in a DeepSpeed file is no number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        step_scheduler_with_optimizer=False,
    )
    _check_ranks(run, accelerator, sharding=sharding)
    if zero:
        _set_deepspeed(run, accelerator)
    stage = accelerator.state.deepspeed_plugin.zero_stage if zero else 0
    if (sharding or stage == 3) and not shardable:
        raise UserError(
            f"this stage cannot be trained under {'FSDP2' if sharding else 'ZeRO-3'}: the field it decodes is "
            "evaluated outside the model's forward, where its shards are not gathered; use ddp.yaml or zero2.yaml"
        )
    return accelerator


def _check_before(run: RunConfig, *, cpu: bool, sharding: bool, zero: bool) -> None:
    """What can be refused before any rank meets another."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is also what accelerate says unasked
    if asked not in ("no", run.precision):
        raise UserError(
            f"the accelerate file says mixed_precision: {asked}, the run precision={run.precision}: make them the same"
        )
    if cpu and run.precision == "fp16":
        raise UserError("precision=fp16 needs a GPU; on a CPU leave it at 'no', or take bf16")
    if cpu and run.precision == "bf16":
        say("precision=bf16 is slower than float32 on most CPUs")
    if (zero or sharding) and run.precision == "fp16":
        raise UserError(f"precision=fp16 is not for {'DeepSpeed' if zero else 'FSDP2'} here: take bf16, or DDP")
    world = int(os.environ.get("WORLD_SIZE", 1))
    share = run.batch_size // world
    if run.batch_size % world or share % run.accumulate or not share:
        raise UserError(
            f"batch_size {run.batch_size} does not divide among {world} processes and {run.accumulate} accumulated "
            f"parts: make it a multiple of {world * run.accumulate}"
        )
    if zero:
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "this launch asks for DeepSpeed, which is not installed: pip install 'shapeloom[deepspeed]'"
            )
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            import deepspeed.ops

            # Its shared-memory extension is compiled at the first start, for minutes; gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_ranks(run: RunConfig, accelerator: Accelerator, *, sharding: bool) -> None:
    asked = run.processes or int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for but {accelerator.num_processes} came up: on a CPU start them with "
            f"torchrun --nproc_per_node {asked} -m shapeloom.training.<stage> (accelerate launch --cpu starts only one)"
        )
    if sharding and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "this launch asks for FSDP, which accelerate does not do without GPUs (it would train each rank on its "
            "own, silently): use torchrun for several CPU processes"
        )
    if sharding and not accelerator.is_fsdp2:
        raise UserError("this launch asks for FSDP 1; set fsdp_version: 2, as in launch/accelerate/fsdp2.yaml")


def _set_deepspeed(run: RunConfig, accelerator: Accelerator) -> None:
    """The run's settings into DeepSpeed's. Raises UserError where its file says something else."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    ours = {
        "train_micro_batch_size_per_gpu": run.batch_size // accelerator.num_processes // run.accumulate,
        "gradient_accumulation_steps": run.accumulate,
        "train_batch_size": run.batch_size,
        "gradient_clipping": run.optim.max_grad_norm,
    }
    for name, value in ours.items():
        theirs = config.get(name, "auto")
        if theirs not in ("auto", value) and not (name == "gradient_accumulation_steps" and theirs == 1):
            raise UserError(f"the accelerate file says {name}={theirs}, the run {value}: write 'auto' there")
        config[name] = value
    for name in ("bf16", "fp16"):
        if config.pop(name, {}).get("enabled") is True:
            raise UserError(f"the accelerate file enables {name}; leave that out, the run's precision={name} decides")
    config["torch_autocast"] = {"enabled": run.precision == "bf16", "dtype": "bfloat16"}
    config["zero_force_ds_cpu_optimizer"] = False  # the run's AdamW is updated wherever its state lies
    accelerator.gradient_accumulation_steps = run.accumulate
