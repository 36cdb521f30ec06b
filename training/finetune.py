"""Training that goes on from a pipeline folder: its denoiser and schedule, adapters (LoRA), parameters left frozen."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from pydantic import Field
from torch import nn

from ..checkpoints.folders import load_model_folder
from ..config import Config
from ..errors import UserError
from ..files import read_json
from ..models.denoiser import Denoiser

__all__ = ["LoraConfig", "add_lora", "check_latents", "freeze", "load_start", "merged", "settings_of"]

ADAPTER = "default"
READ_DIRECTLY = ("latent_out",)  # the model multiplies with their weights itself, past any adapter


class LoraConfig(Config):
    """Adapters W + (alpha / rank)·B·A on linear layers (arXiv 2106.09685, §4.1), the rest frozen.

    rank: 0 trains the whole model. alpha: None is the rank, a scale of 1.
    targets: linear layers, by the ends of their names; train: further layers or parameters, trained whole.
    """

    rank: int = Field(default=0, ge=0)
    alpha: float | None = Field(default=None, gt=0)
    targets: tuple[str, ...] = ("attention.query", "attention.key_value", "attention.out", "mlp.0", "mlp.2")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    train: tuple[str, ...] = ()


# --- the folder to start from ----------------------------------------------------------------------------------------


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a pipeline folder's denoiser. Raises UserError where there is none."""
    path = folder / "denoiser" / "config.json"
    if not path.is_file():
        inner = folder / "pipeline"
        hint = f"; did you mean {inner}?" if (inner / "denoiser" / "config.json").is_file() else ""
        raise UserError(f"init: {folder} is not a pipeline folder: it has no denoiser/config.json{hint}")
    settings = read_json(path, "denoiser settings")
    if not isinstance(settings, dict):
        raise UserError(f"init: {path} holds no settings: the folder is damaged")
    return settings


def load_start(folder: Path) -> tuple[Denoiser, FlowMatchEulerDiscreteScheduler | HeunDiscreteScheduler]:
    """A pipeline folder's denoiser, in float32 and training mode, and its scheduler.

    Raises: UserError if either is missing or damaged, or the scheduler is not for what the denoiser predicts.
    """
    denoiser = load_model_folder(Denoiser, folder / "denoiser").float().train()
    kind = HeunDiscreteScheduler if denoiser.config.prediction == "sample" else FlowMatchEulerDiscreteScheduler
    settings = read_json(folder / "scheduler" / "scheduler_config.json", "scheduler settings")
    if settings.get("_class_name") != kind.__name__:
        raise UserError(
            f"init: {folder} has a {settings.get('_class_name')} for a denoiser that predicts the "
            f"{'data' if denoiser.config.prediction == 'sample' else 'flow'}, which goes with a {kind.__name__}"
        )
    return denoiser, kind.from_pretrained(folder / "scheduler")


def check_latents(denoiser: Denoiser, folder: Path, shape: tuple[int, ...], hashes: dict[str, str], data: str) -> None:
    """Refuse latents that are not those of the folder's autoencoder, or features not of its conditioner.

    Args:
        shape: [L, C] of the latents in `data`.
        hashes: autoencoder_hash and conditioner_hash of what encoded them.
    """
    config = denoiser.config
    remedy = f"encode with {folder}/autoencoder and {folder}/conditioner"
    if shape != (config.n_latents, config.channels):
        have, want = ("{} x {}".format(*sizes) for sizes in (shape, (config.n_latents, config.channels)))
        raise UserError(f"the latents in {data} are {have}, the denoiser in {folder} makes {want}: {remedy}")
    for part in ("autoencoder", "conditioner"):
        if hashes[f"{part}_hash"] != config[f"{part}_hash"]:
            raise UserError(
                f"{data} was encoded with another {part} (hash {hashes[f'{part}_hash'][:12]}) than the denoiser in "
                f"{folder} was trained with (hash {config[f'{part}_hash'][:12]}): {remedy}"
            )


# --- adapters --------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, lora: LoraConfig) -> None:
    """Put adapters into `model` and freeze all else but `lora.train`. As they start, they change nothing.

    Raises: UserError for a name that no linear layer (or, of `train`, no layer or parameter) ends with.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    linear = [name for name in linear if name not in READ_DIRECTLY]
    _refuse_unmatched("lora.targets", lora.targets, linear)
    parameters = dict(model.named_parameters())
    _refuse_unmatched("lora.train", lora.train, [*dict(model.named_modules()), *parameters])
    chosen = [name for name in linear if any(_ends_with(name, target) for target in lora.targets)]
    alpha: Any = lora.alpha or lora.rank  # peft says int, and divides
    if chosen:
        settings = PeftConfig(r=lora.rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=lora.dropout)
        inject_adapter_in_model(settings, model, ADAPTER)
    else:
        model.requires_grad_(False)
    for name, parameter in parameters.items():
        parts = name.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if any(_ends_with(one, wanted) for one in above for wanted in lora.train):
            parameter.requires_grad_(True)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train no parameter whose name, or that of a layer above it, a pattern matches; after `add_lora`, if both are.

    Args:
        patterns: as `fnmatch` reads them, where * is also of several parts of a name: `blocks.[0-3]`, `*.norm_?.*`,
            `*.bias`. Names are those of the model without adapters; a layer's adapters are frozen with it.
    Raises: UserError for a pattern that matches nothing.
    Example: freeze(model, ["time", "blocks.[0-3]"])
    """
    above: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.replace(".base_layer.", ".").split(".")
        above[name] = [".".join(parts[: i + 1]) for i in range(len(parts))]
    names = list(dict.fromkeys(name for every in above.values() for name in every if ".lora_" not in name))
    for pattern in patterns:
        matched = [name for name, every in above.items() if any(fnmatchcase(one, pattern) for one in every)]
        if not matched:
            near = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.4)
            near = near or list(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(
                f"freeze: no parameter or layer is called '{pattern}'; the nearest are {', '.join(near[:8])}"
            )
        for name in matched:
            model.get_parameter(name).requires_grad_(False)


def merged(model: Denoiser) -> Denoiser:
    """An ordinary denoiser of the same function, adapters added into the weights; `model` itself if it has none."""
    if not hasattr(model, "peft_config"):
        return model
    from peft.tuners.lora import Linear

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    state = model.state_dict()
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, layer in layers.items():
        plain[f"{name}.weight"] = layer.weight.detach() + layer.get_delta_weight(ADAPTER).detach()
    with torch.device("meta"):  # no weights are made that would be thrown away
        ordinary = Denoiser.from_config(model.config)
    ordinary.load_state_dict(plain, assign=True)
    return ordinary.requires_grad_(False).eval()


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _refuse_unmatched(key: str, wanted: tuple[str, ...], names: list[str]) -> None:
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    for end in wanted:
        if key == "lora.targets" and end in READ_DIRECTLY:
            raise UserError(f"{key}: '{end}' cannot take an adapter: name it in lora.train, to be trained whole")
        if not any(_ends_with(name, end) for name in names):
            near = difflib.get_close_matches(end, ends, n=3, cutoff=0.4) or ends
            what = "linear layer" if key == "lora.targets" else "layer or parameter"
            raise UserError(f"{key}: no {what} is called '{end}'; the nearest are {', '.join(near[:16])}")
