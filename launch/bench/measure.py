"""How every benchmark measures: medians, alternated runs, peak memory, and one JSON line at the end."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["finish", "interleaved", "median_seconds", "peak_rss_mb"]


def median_seconds(call: Callable[[], object], repeat: int) -> float:
    """Median wall time of `repeat` calls, in seconds; warm `call` up before."""
    return interleaved({"": call}, repeat)[""]


def interleaved(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each of `calls`, run in turns, so that a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_rss_mb(call: Callable[[], object]) -> float:
    """How far resident memory rises above its start while `call` runs in a forked child, in MB (1e6 bytes).

    What the parent already holds (weights, libraries) is not counted. CPU only: CUDA does not survive a fork.
    Raises: RuntimeError where the child fails.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            _give_back_freed()
            start = _resident_bytes()
            call()
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
            os.write(write_end, str(growth).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)  # no clean-up of the parent's, and nothing printed twice
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("the child that measures memory failed")
    return int(answer) / 1e6


def finish(result: dict) -> None:
    """Print `result` and what it was measured on as the last line, in JSON."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _cpu_name()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(result | machine), flush=True)


def _give_back_freed() -> None:
    """Let go of memory that the allocator holds but nobody uses: filling it again would not show as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
