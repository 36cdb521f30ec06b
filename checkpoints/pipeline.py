"""Pipeline folders: what training writes is what sampling loads."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from ..errors import UserError
from ..files import atomic_folder, read_json
from ..models.autoencoder import Autoencoder
from ..models.conditioner import Conditioner
from ..models.denoiser import Denoiser
from ..models.hashing import weights_hash
from ..models.pipeline import ShapeloomPipeline
from ..models.transformers_clip import TransformersConditioner
from .folders import class_of, load_model_folder, refuse_pickles

__all__ = ["load", "load_conditioner", "publish_pipeline"]

SCHEDULERS = {cls.__name__: cls for cls in (FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler)}


def publish_pipeline(pipeline: ShapeloomPipeline, folder: Path) -> None:
    """Write a diffusers pipeline folder; a reader meets the old one or the new one."""
    with atomic_folder(folder) as aside:
        pipeline.save_pretrained(aside)


def load(folder: str | Path) -> ShapeloomPipeline:
    """The pipeline of a folder, checked, in evaluation mode on the CPU.

    Raises: UserError if the folder is missing or damaged, holds pickles, or its parts do not belong together: a
        denoiser makes latents of the one autoencoder, and reads features of the one CLIP, it was trained with.
    """
    folder = Path(folder)
    refuse_pickles(folder)
    index = read_json(folder / "model_index.json", "pipeline index") if (folder / "model_index.json").exists() else None
    if index is None:
        inner = folder / "pipeline"
        hint = f"; did you mean {inner}?" if (inner / "model_index.json").is_file() else ""
        raise UserError(f"{folder} is not a pipeline folder: it has no model_index.json{hint}")
    autoencoder = load_model_folder(Autoencoder, folder / "autoencoder")
    denoiser = load_model_folder(Denoiser, folder / "denoiser")
    conditioner = load_conditioner(folder / "conditioner")
    if denoiser.config.autoencoder_hash != weights_hash(autoencoder):
        raise UserError(
            f"{folder}: its denoiser was trained on latents of another autoencoder "
            f"(hash {denoiser.config.autoencoder_hash[:12]}); put that one back, "
            f"or train a denoiser on the latents of this one"
        )
    if denoiser.config.conditioner_hash != conditioner.weights_hash:
        raise UserError(
            f"{folder}: its denoiser was trained with another conditioner "
            f"(hash {denoiser.config.conditioner_hash[:12]}); put that one back"
        )
    return ShapeloomPipeline(autoencoder, denoiser, conditioner, _load_scheduler(folder / "scheduler"))


def load_conditioner(folder: Path) -> Conditioner | TransformersConditioner:
    """A pipeline's conditioner, of either kind. Raises UserError as `load_model_folder`."""
    kind = TransformersConditioner if class_of(folder) == "TransformersConditioner" else Conditioner
    return load_model_folder(kind, folder)


def _load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler | HeunDiscreteScheduler:
    config = read_json(folder / "scheduler_config.json", "scheduler settings")
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise UserError(f"{folder} holds a {name}; there are {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name].from_pretrained(folder)
