"""Start the ranks of one machine as an accelerate file says, pass signals on to them, and end as they ended.

    python -m shapeloom.launch.ranks --accelerate FILE [--ranks N] [--nodes N --node I --main HOST] MODULE [OPTION ...]

For job managers, which go by signals and exit codes. `accelerate launch` and torchrun start the same ranks, but end
with 1 whatever a rank ended with, so "state is saved, start me again" is lost; kill the ranks 30 s after SIGTERM,
in the middle of a save; and do not pass SIGUSR1 on. Where the job manager itself starts the ranks (Slurm's srun) and
has set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, this process becomes that rank.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, run_command
from ..training.loop import REQUEUE_EXIT_CODE
from .launch_file import LaunchFile, environment, read_launch_file

__all__ = ["main", "supervise"]

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
NUMBERING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerate", type=Path, required=True, help="as accelerate launch's --config_file")
    parser.add_argument("--ranks", type=int, help="on this machine; else num_processes over num_machines of the file")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--node", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--main", default="127.0.0.1", help="address of machine 0")
    parser.add_argument("--port", type=int, help="there; any free one where there is one machine")
    parser.add_argument("--save-s", type=float, default=600, help="how long a rank may save after another has ended")
    parser.add_argument("--patience-s", type=float, default=30, help="how long a rank may live after another has died")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="MODULE [OPTION ...]")
    options = parser.parse_args()
    if not options.command:
        parser.error("no module is given, such as shapeloom.training.denoiser")
    command = [sys.executable, "-m", *options.command]
    file = read_launch_file(options.accelerate)
    env = os.environ | environment(file)
    if "RANK" in os.environ:
        missing = [name for name in NUMBERING if name not in os.environ]
        if missing:
            raise UserError(f"RANK is set but {missing[0]} is not: set {', '.join(NUMBERING)}, or none of them")
        os.execve(sys.executable, command, env)
    environments = [env | numbers for numbers in numbering(options, file)]
    sys.exit(supervise(command, environments, save_s=options.save_s, patience_s=options.patience_s))


def numbering(options: argparse.Namespace, file: LaunchFile) -> list[dict[str, str]]:
    """What tells each rank of this machine which it is. Raises UserError for counts that cannot be."""
    ranks = options.ranks or file.processes // file.machines
    if not 0 <= options.node < options.nodes or ranks < 1:
        raise UserError(f"--node {options.node} of --nodes {options.nodes} with {ranks} ranks each cannot be")
    world = ranks * options.nodes
    if file.layout == "one" and world > 1:
        raise UserError(f"{file.path} is for one process, not {world}: take cpu2.yaml or ddp.yaml")
    if options.nodes > 1 and options.main == "127.0.0.1":
        raise UserError("--nodes needs --main, the address of machine 0")
    port = options.port or (free_port() if options.nodes == 1 else 29500)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": options.main, "MASTER_PORT": port}
    every = [shared | {"RANK": options.node * ranks + local, "LOCAL_RANK": local} for local in range(ranks)]
    return [{name: str(value) for name, value in one.items()} for one in every]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def supervise(
    command: Sequence[str], environments: Sequence[dict[str, str]], *, save_s: float, patience_s: float
) -> int:
    """Run `command` once in each environment; returns the exit code of the first that failed.

    That is REQUEUE_EXIT_CODE where some ended with it and none failed, and 0 where all ended well. The rest are killed
    `save_s` after one asked to be started again, `patience_s` after one failed: they would wait for it for long.
    """
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        for rank in ranks:
            rank.send_signal(number)  # does nothing where it has ended

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    for env in environments:  # in sessions of their own: the terminal's Ctrl-C then reaches a rank once, through us
        ranks.append(subprocess.Popen(command, env=env, start_new_session=True))
    failed, asked, until = 0, False, float("inf")
    waiting = set(range(len(ranks)))
    while waiting:
        for i in sorted(waiting):
            code = ranks[i].poll()
            if code is None:
                continue
            waiting.discard(i)
            if code == REQUEUE_EXIT_CODE:
                asked = True
                until = min(until, time.monotonic() + save_s)
            elif code:
                if waiting and not failed:
                    print(f"rank {environments[i]['RANK']} failed ({code}); ending the others", file=sys.stderr)
                failed = failed or (code if code > 0 else 128 - code)
                until = min(until, time.monotonic() + patience_s)
        if time.monotonic() > until:
            for i in waiting:
                ranks[i].kill()
        time.sleep(0.05)
    return failed or (REQUEUE_EXIT_CODE if asked else 0)


if __name__ == "__main__":
    run_command(main)
