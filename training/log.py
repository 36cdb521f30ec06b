"""What a run tells: log.jsonl, trackers and the progress bar. A resumed run's log has no step twice."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ..checkpoints.state import Progress
from ..errors import UserError
from ..files import write_atomic, write_json
from ..progress import Bar
from .config import RunConfig

__all__ = ["Log", "check_trackers"]

MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_trackers(run: RunConfig) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in run.trackers:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UserError(
                f"trackers: {name} is not installed; pip install {MODULES[name]}, or leave it out of trackers"
            )


class Log:
    """Written by the main process; metrics are read from the device only every `log_every` steps.

    Args:
        flops: floating-point operations a sample costs in training, forward and backward; 0 where nobody counted them.
    """

    def __init__(
        self, accelerator: Accelerator, run: RunConfig, out: Path, name: str, progress: Progress, *, flops: float = 0.0
    ) -> None:
        self.accelerator, self.run, self.out, self.progress, self.flops = accelerator, run, out, progress, flops
        self.name, self.main = name, accelerator.is_main_process
        self.bar = Bar(run.steps, name, start=progress.step, quiet=not self.main)
        self.began = time.monotonic() - progress.seconds
        self.marked = (progress.step, time.monotonic())
        self.trackers: list[Any] = []

    def __enter__(self) -> Log:
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "config.json", self.run.model_dump(mode="json"))
            path = self.out / "log.jsonl"
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if self._before(line)]
                write_atomic(path, "".join(line + "\n" for line in kept))
        self._start_trackers()
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
        for tracker in self.trackers:
            tracker.finish()

    def _start_trackers(self) -> None:
        """Accelerate's, on the main process alone."""
        if not self.main:
            return
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": self.progress.step + 1},
            "wandb": {"id": hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16], "resume": "allow"},
            "mlflow": {},
        }
        for name in self.run.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            where = (str(self.out),) if kind.requires_logging_directory else ()
            # TensorBoard takes the name as a folder below `where`, the others as the project's
            tracker = kind(
                "tensorboard" if name == "tensorboard" else f"shapeloom-{self.name}", *where, **options[name]
            )
            tracker.start()
            self.trackers.append(tracker)

    def _before(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.progress.step
        except (ValueError, KeyError):  # a line the last kill cut short
            return False

    def step(self, **metrics: torch.Tensor | float) -> None:
        """Note a step; `metrics` are of this rank, and averaged over all."""
        self.progress.seconds = time.monotonic() - self.began
        shown: dict[str, float] = {}
        if self.progress.step % self.run.log_every == 0:
            reduced = {name: torch.as_tensor(value, device=self.accelerator.device) for name, value in metrics.items()}
            if self.accelerator.num_processes > 1:
                reduced = {name: self.accelerator.reduce(value.float(), "mean") for name, value in reduced.items()}
            values = {name: float(value) for name, value in reduced.items()}
            self.write(values | self._speed())
            shown = {"loss": values["loss"]}
        self.bar.update(1, **shown)

    def _speed(self) -> dict[str, float]:
        """Since the last of these lines: samples a second of all ranks, peak memory of this one, share of the FLOPs."""
        (step, then), now = self.marked, time.monotonic()
        self.marked = (self.progress.step, now)
        rate = (self.progress.step - step) * self.run.batch_size / max(now - then, 1e-9)
        speed = {"samples_per_s": rate, "peak_gb": _peak_bytes(self.accelerator.device) / 1e9}
        if self.flops:
            flops = rate * self.flops / self.accelerator.num_processes
            speed["tflops"] = flops / 1e12
            if self.run.peak_tflops:
                speed["mfu"] = flops / 1e12 / self.run.peak_tflops
        return speed

    def pause(self, seconds: float) -> None:
        """Leave time out of the speed that was not spent on steps."""
        step, then = self.marked
        self.marked = (step, then + seconds)

    def write(self, values: dict[str, float]) -> None:
        """Note what the main process has measured at this step."""
        if not self.main:
            return
        line = {"step": self.progress.step, "time": round(self.progress.seconds, 2), **values}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.log(values, step=self.progress.step)


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB
