"""One small random CLIP in every form an evaluator can come in, made on the spot."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from shap_e_models import randomised, tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from shapeloom.checkpoints.clip import publish_clip
from shapeloom.checkpoints.folders import publish_model
from shapeloom.models.conditioner import Conditioner

ARCHITECTURE = "tiny-ViT"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
OTHER_MEAN, OTHER_STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def teach_architectures(folder: Path) -> None:
    """Have open_clip know `tiny-ViT` and `tiny-ViT-quickgelu`."""
    for name, extra in ((ARCHITECTURE, {}), (f"{ARCHITECTURE}-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps({**CONFIG, **extra}))
        open_clip.add_model_config(folder / f"{name}.json")


def small_vit(seed: int = 0, **config: object) -> Conditioner:
    """With CLIP's words. mean and std are open_clip's defaults unless given."""
    kept = {key: config.pop(key) for key in ("mean", "std", "name") if key in config}
    statistics = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    return randomised(Conditioner(**{"model_cfg": {**CONFIG, **config}, **statistics, **kept}), seed)


def write_open_clip(model: Conditioner, folder: Path) -> Path:
    publish_clip(model, folder)
    return folder


def write_conditioner(model: Conditioner, folder: Path) -> Path:
    publish_model(model, folder)
    return folder


def write_weights(model: Conditioner, file: Path, **extra: torch.Tensor) -> Path:
    save_file({**model.clip.state_dict(), **extra}, file)
    return file


def as_transformers(model: Conditioner) -> CLIPModel:
    """The same CLIP in transformers' classes, by the well-known renaming."""
    state = model.clip.state_dict()
    act = "quick_gelu" if model.config.model_cfg.get("quick_gelu") else "gelu"
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "hidden_act": act, "projection_dim": 24}  # fmt: skip
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407, "max_position_embeddings": 20}
    theirs = CLIPModel(
        CLIPConfig(
            text_config={**shape, **ids},
            vision_config={**shape, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    )
    renamed = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    norms = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
             "text_model.final_layer_norm": "ln_final"}  # fmt: skip
    for tower, ours in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for i in range(2):
            to, of = f"{tower}.encoder.layers.{i}", f"{ours}.resblocks.{i}"
            norms |= {f"{to}.layer_norm1": f"{of}.ln_1", f"{to}.layer_norm2": f"{of}.ln_2",
                      f"{to}.mlp.fc1": f"{of}.mlp.c_fc", f"{to}.mlp.fc2": f"{of}.mlp.c_proj",
                      f"{to}.self_attn.out_proj": f"{of}.attn.out_proj"}  # fmt: skip
            for kind in ("weight", "bias"):
                parts = state[f"{of}.attn.in_proj_{kind}"].chunk(3)
                renamed |= {f"{to}.self_attn.{n}_proj.{kind}": p for n, p in zip("qkv", parts, strict=True)}
    for to, of in norms.items():
        renamed |= {f"{to}.{kind}": state[f"{of}.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(renamed)
    return theirs.eval()


def write_transformers(model: Conditioner, folder: Path) -> Path:
    as_transformers(model).save_pretrained(folder)
    write_processors(folder)
    return folder


def write_processors(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)


def write_cache(cache: Path, repository: str, folder: Path, commit: str = "0" * 40) -> Path:
    """The files of `folder` as the hub's cache keeps them: a snapshot of links, and what `main` stands for."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    return snapshot


def write_forms(folder: Path) -> dict[str, str]:
    """One CLIP, as sources of every form."""
    teach_architectures(folder)
    model = small_vit()
    return {
        "open_clip": str(write_open_clip(model, folder / "published")),
        "ours": str(write_conditioner(model, folder / "conditioner")),
        "transformers": str(write_transformers(model, folder / "theirs")),
        "weights": f"{ARCHITECTURE}={write_weights(model, folder / 'x.safetensors')}",
    }


def cut_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the hub, and a network that fails the test when it is asked, though nothing says "offline"."""

    def refuse(*address: object, **more: object) -> None:
        pytest.fail(f"the network was asked for {address}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
