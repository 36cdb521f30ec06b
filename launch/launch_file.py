"""What a file for `accelerate launch --config_file` says: which layout, how many ranks, and each rank's environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from ..errors import UserError

__all__ = ["LaunchFile", "Layout", "environment", "read_launch_file"]

Layout = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class LaunchFile:
    """layout: how weights, gradients, AdamW's averages and EMA lie on the ranks; `one` is a single process.

    processes, machines: of the whole job. cpu: there are no GPUs.
    precision: no, bf16 or fp16, as the file says; the run's setting is the one that counts.
    reshard: FSDP2 lets go of a block's gathered weights after its forward pass.
    offload_optimiser, offload_weights: kept in host memory.
    """

    path: Path
    layout: Layout
    processes: int
    machines: int
    cpu: bool
    precision: str
    reshard: bool = True
    offload_optimiser: bool = False
    offload_weights: bool = False


def read_launch_file(path: Path) -> LaunchFile:
    """Raises UserError for a file that accelerate does not take, or that asks for what the training does not do."""
    config = _load(path)
    deepspeed, fsdp = config.deepspeed_config, config.fsdp_config
    return LaunchFile(
        path=path,
        layout=_layout(path, config),
        processes=config.num_processes,
        machines=config.num_machines,
        cpu=bool(config.use_cpu),
        precision=str(config.mixed_precision or "no"),
        reshard=bool(fsdp.get("fsdp_reshard_after_forward", True)),
        offload_optimiser=deepspeed.get("offload_optimizer_device", "none") != "none"
        or bool(fsdp.get("fsdp_offload_params")),
        offload_weights=deepspeed.get("offload_param_device", "none") != "none"
        or bool(fsdp.get("fsdp_offload_params")),
    )


def _load(path: Path) -> ClusterConfig:
    """Accelerate's own reading, and a look at the groups' keys, of which it would take any."""
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in (Path(__file__).parent / "accelerate").glob("*.yaml")))
        raise UserError(f"accelerate file {path} does not exist (in launch/accelerate/ there are {there})")
    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, AttributeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"accelerate file {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, ClusterConfig):
        raise UserError(f"accelerate file {path}: compute_environment must be LOCAL_MACHINE")
    known = {action.dest for action in launch_command_parser()._actions}
    for group in ("deepspeed_config", "fsdp_config"):
        unknown = sorted(set(getattr(config, group)) - known)
        if unknown:
            raise UserError(f"accelerate file {path}: {group} has the unknown key {unknown[0]}")
    if config.num_processes < 1 or config.num_machines < 1 or config.num_processes % config.num_machines:
        raise UserError(
            f"accelerate file {path}: num_processes {config.num_processes} must be a multiple of num_machines "
            f"{config.num_machines}"
        )
    return config


def _layout(path: Path, config: ClusterConfig) -> Layout:
    kind = config.distributed_type
    if kind == DistributedType.NO:
        return "one"
    if kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return "ddp"
    if kind == DistributedType.FSDP:
        if config.fsdp_config.get("fsdp_version") != 2:
            raise UserError(f"accelerate file {path}: set fsdp_version: 2, FSDP 1 is not supported here")
        return "fsdp2"
    if kind == DistributedType.DEEPSPEED:
        if "deepspeed_config_file" in config.deepspeed_config:
            raise UserError(f"accelerate file {path}: leave deepspeed_config_file out, give zero_stage")
        stage = config.deepspeed_config.get("zero_stage", 2)
        layouts: dict[Any, Layout] = {1: "zero1", 2: "zero2", 3: "zero3"}
        if stage not in layouts:
            raise UserError(f"accelerate file {path}: zero_stage {stage} is not one of 1, 2, 3")
        return layouts[stage]
    raise UserError(f"accelerate file {path}: distributed_type {kind.value} is not supported here")


def environment(file: LaunchFile) -> dict[str, str]:
    """The variables that `accelerate launch` would give every rank, without those that number the ranks."""
    config = _load(file.path)
    arguments = launch_command_parser().parse_args(["--config_file", str(file.path), "-m", "module"])
    for group in (vars(config), config.deepspeed_config, config.fsdp_config):
        for name, value in group.items():
            setattr(arguments, name, value)
    arguments.num_machines, arguments.main_process_port = 1, 0  # whoever starts the ranks says where they meet
    arguments.dynamo_backend, arguments.mixed_precision = "no", file.precision
    arguments.num_cpu_threads_per_process = int(os.environ.get("OMP_NUM_THREADS", 1))
    if file.layout.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        _, env = prepare_deepspeed_cmd_env(arguments)
    elif file.cpu or file.layout == "one":
        _, env = prepare_simple_launcher_cmd_env(arguments)
    else:
        arguments.use_fsdp = file.layout == "fsdp2"
        env = prepare_multi_gpu_env(arguments)
    ours = ("ACCELERATE_", "FSDP_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # others number ranks or pin threads
    return {name: value for name, value in env.items() if name.startswith(ours)}
