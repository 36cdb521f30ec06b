"""Weight files of others, read as tensors alone: safetensors, or pickles through torch's restricted reader."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError

__all__ = ["read_weights"]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor of a `.safetensors`, `.pt` or `.bin` file; memory-mapped where the format allows.

    A pickle is read with `weights_only=True`: nothing in it is ever run.

    Raises: UserError if the file is missing, cut short, no such file, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError as error:
        raise UserError(_about_pickle(path, str(error))) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as weights ({reason}): it may be cut short, download it again"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no table of named tensors: it is not a weights file")
    return state


def _unpickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the old format, which cannot be mapped


def _about_pickle(path: Path, said: str) -> str:
    asked = re.search(r"(?:GLOBAL|global) ([\w.]+)", said)
    if asked:
        return f"{path} holds code ({asked.group(1)}), not weights alone: nothing of it was run, do not trust the file"
    return f"{path} is not a file of weights, or is cut short: download it again"
