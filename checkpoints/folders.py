"""Model folders in diffusers' form (config.json, safetensors): written aside and renamed, read with clear messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from diffusers.models.modeling_utils import ModelMixin

from ..errors import UserError
from ..files import atomic_folder

__all__ = ["class_of", "load_model_folder", "publish_model", "refuse_pickles"]

Model = TypeVar("Model", bound=ModelMixin)

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def publish_model(model: ModelMixin, folder: Path) -> None:
    """Write `model` so that a reader, or a crash, meets the old folder or the new one."""
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)


def load_model_folder(cls: type[Model], folder: str | Path) -> Model:
    """A model from its folder, in evaluation mode.

    Raises: UserError if the folder is missing, holds another class, is cut short, or holds a pickle.
    """
    folder = Path(folder)
    what = cls.__name__.lower()
    refuse_pickles(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a {what} folder: it has no config.json")
    class_name = class_of(folder)
    if class_name is None:
        inner = folder / what
        meant = f": did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise UserError(f"{folder} is not a {what} folder, its config.json names no model{meant}")
    if class_name != cls.__name__:
        raise UserError(f"{folder} holds a {class_name}, not a {cls.__name__}")
    try:
        model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the weights cannot be read ({reason})") from None
    missing = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{folder}: weights and config do not match ({len(missing)} tensors, the first is {missing[0]})"
        )
    return model.eval()


def class_of(folder: Path) -> str | None:
    """The class that a model folder's config.json names; None where there is no such file. Raises UserError."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text()).get("_class_name")
    except (ValueError, AttributeError):
        raise UserError(f"{config} is not valid JSON: the folder is damaged, write it again") from None


def refuse_pickles(path: Path) -> None:
    """Weights are safetensors here; a pickle can run any code when it is opened.

    Raises: UserError if `path` is a pickle, is missing, or is a folder with pickles and no safetensors.
    """
    if path.is_file() and (path.suffix in PICKLES or _looks_pickled(path)):
        raise UserError(f"{path} is a pickle, which can run code when opened; convert it to safetensors first")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if pickles and not any(path.glob("*.safetensors")):
        raise UserError(f"{pickles[0]} is a pickle, which can run code when opened; convert it to safetensors first")


def _looks_pickled(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(2)
    return head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
