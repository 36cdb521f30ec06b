"""One rank of a training under test: the stage's own command, laid out as `LAYOUT` says although there is no GPU."""

from __future__ import annotations

import os
import sys

import torch


def force_fsdp2() -> None:
    """Accelerate shards on GPUs alone; its own code for that also runs on a CPU, once it believes in a GPU there."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"
    assert FullyShardedDataParallelPlugin(fsdp_version=2).fsdp_version == 2


def main() -> None:
    if os.environ["LAYOUT"] == "fsdp2":
        force_fsdp2()
    stage = sys.argv.pop(1)
    from shapeloom.training.stages import main as stage_main

    stage_main(stage)


if __name__ == "__main__":
    main()
