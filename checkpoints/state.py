"""A training run's state: written aside by all ranks, published by one rename, pruned, found again.

Layout of a run folder: `state/<step>/` (accelerate's model, optimiser and random states, `ema.safetensors`,
`progress.json`) and `state/latest`, a text file that names the step to go on from.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn

from ..errors import UserError
from ..files import ASIDE, read_json, write_atomic, write_json

__all__ = ["Progress", "find_state", "load_state", "save_state"]


@dataclass
class Progress:
    """step: optimiser steps done; seconds: training time so far, over all starts."""

    step: int = 0
    seconds: float = 0.0


def save_state(
    accelerator: Accelerator, ema: nn.Module, progress: Progress, run: Path, *, keep_last: int, keep_every: int
) -> None:
    """Write `run/state/<step>` and point `latest` at it; called by all ranks together.

    A crash at any moment leaves the previous state whole and pointed at.
    """
    folder = run / "state"
    aside = folder / f"{progress.step:08d}{ASIDE}state"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_model(ema, str(aside / "ema.safetensors"))
        write_json(aside / "progress.json", vars(progress))
        final = folder / f"{progress.step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        write_atomic(folder / "latest", final.name)
        _prune(folder, keep_last, keep_every)
    accelerator.wait_for_everyone()


def find_state(run: Path, resume: str) -> Path | None:
    """The state folder to go on from.

    Args:
        resume: `auto` (the latest, if there is one), `never`, or a path to a state folder.
    Raises: UserError if what is asked for or pointed at is not there.
    """
    if resume == "never":
        return None
    if resume != "auto":
        if not (Path(resume) / "progress.json").is_file():
            raise UserError(f"--resume {resume}: no training state there; give a folder like {run}/state/00001000")
        return Path(resume)
    pointer = run / "state" / "latest"
    if not pointer.is_file():
        return None
    folder = run / "state" / pointer.read_text().strip()
    if not (folder / "progress.json").is_file():
        raise UserError(f"{pointer} names {folder.name}, which is not there; write the name of another state into it")
    return folder


def load_state(accelerator: Accelerator, ema: nn.Module, folder: Path) -> Progress:
    """Put everything back as it was when `folder` was written. Pickles are read with `weights_only=True` alone."""
    fields: dict[str, Any] = read_json(folder / "progress.json", "training state")
    try:
        accelerator.load_state(str(folder))
        load_model(ema, str(folder / "ema.safetensors"))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} holds the state of another model ({reason}); use another --out") from None
    return Progress(**fields)


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Drop old states and whatever a killed run left half-written."""
    states = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    for path in states[:-keep_last]:
        if not (keep_every and int(path.name) % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
