"""Options that several verbs of the ``shapeloom`` command share, and how their texts are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError

MAX_SEEDS = 100_000
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Workers = Annotated[int, typer.Option(min=1, help="Processes to use.", show_default="all cores")]
Preset = Annotated[
    str | None, typer.Option(help="A preset's name, or a YAML file of that form; tiny:judge takes that section.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML or JSON over the preset, such as a run's config.json.")
]
RawData = Annotated[
    str, typer.Option(help="A folder of raw shards; or its URL (https://, s3://, …) or a pipe, which is streamed.")
]
Resume = Annotated[
    str, typer.Option(help="auto goes on where OUT was, never starts afresh; or a state folder to go on from.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over preset and file, such as optim.lr=1e-4."),
]
PipelineFolder = Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline folder, as training leaves it.")]
Seeds = Annotated[str, typer.Option(help="Such as 0-3, or 0,5,7.")]
Steps = Annotated[int, typer.Option(min=1, max=10_000, help="Sampling steps.")]
Solver = Annotated[
    str, typer.Option(help="own, the pipeline's; or dpm++ (models that predict the data): as good in fewer calls.")
]
TextGuidance = Annotated[float, typer.Option(min=0.0, help="How strongly the text is followed; 1 is no guidance.")]
ImageGuidance = Annotated[float, typer.Option(min=0.0, help="How strongly the image is followed; 1 is no guidance.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.", show_default="the best there is")]


def parse_seeds(text: str) -> list[int]:
    """``"0-3"`` -> [0, 1, 2, 3], ``"0,5,7"`` -> [0, 5, 7], ``"0-2,9"`` -> [0, 1, 2, 9]. Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        numbers = [first, last] if dash else [first]
        if not all(word.isascii() and word.isdigit() and len(word) < 19 for word in numbers):
            raise UserError(f"--seeds '{text}' is not understood: write 0-3, or 0,5,7")
        begin, end = int(numbers[0]), int(numbers[-1])
        if begin > end:
            raise UserError(f"--seeds '{text}' counts backwards: write {end}-{begin}")
        if len(seeds) + end - begin >= MAX_SEEDS:
            raise UserError(f"--seeds '{text}' names more than {MAX_SEEDS} seeds")
        seeds.extend(range(begin, end + 1))
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds '{text}' names a seed twice")
    return seeds
