"""Latent folders and pipelines of a size that trains in seconds, made without any earlier stage."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler

from shapeloom.checkpoints.folders import publish_model
from shapeloom.checkpoints.pipeline import publish_pipeline
from shapeloom.data_pipes.latents import LatentSample, encode_latent_sample
from shapeloom.data_pipes.shards import LATENT_FORMAT, ShardWriter, begin_folder, write_manifest
from shapeloom.launch import cli
from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.conditioner import Conditioner
from shapeloom.models.denoiser import Denoiser
from shapeloom.models.guidance import shap_e_scheduler
from shapeloom.models.hashing import weights_hash
from shapeloom.models.pipeline import ShapeloomPipeline
from shapeloom.models.transformers_clip import TransformersConditioner
from shapeloom.training.clip import ClipModelConfig, clip_config, train_tokenizer

AnyConditioner = Conditioner | TransformersConditioner
CAPTIONS = ["a red cube", "a small blue ball", "a green cone on top of a box", "two yellow rings"]
L, C = 16, 8


def shapeloom(*words: object) -> tuple[int, str, str]:
    """The command, in this process, which costs no start: its exit code, what it said, and its errors."""
    said, errors, code = io.StringIO(), io.StringIO(), 0
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = ["shapeloom", *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of a process's first run
    return code, said.getvalue(), errors.getvalue()


def succeed(*words: object) -> str:
    """The command, which must end well; what it said."""
    code, said, errors = shapeloom(*words)
    assert code == 0, said + errors
    return said


def small_clip(seed: int = 0) -> Conditioner:
    torch.manual_seed(seed)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    config = ClipModelConfig(embed_dim=24, vision_cfg=vision, text_width=32, text_heads=2, text_layers=1)
    return Conditioner(**clip_config(config, train_tokenizer(CAPTIONS * 5, 300))).eval()


def small_autoencoder(n_latents: int = L, channels: int = C, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(n_latents=n_latents, channels=channels, width=32, heads=2, hidden=16).eval()


def four_latents(shape: tuple[int, int] = (L, C)) -> np.ndarray:
    """[4, L, C] in (-1, 1), far from one another."""
    return np.random.default_rng(5).uniform(-0.9, 0.9, (4, *shape)).astype(np.float16)


def write_latents(
    folder: Path,
    autoencoder: Autoencoder,
    conditioner: AnyConditioner,
    latents: np.ndarray,
    *,
    text: bool = True,
    image: bool = True,
) -> Path:
    """A latent folder with one object a caption; without text or image as a conditioner of one tower leaves it."""
    settings = {
        "autoencoder_hash": weights_hash(autoencoder),
        "conditioner_hash": conditioner.weights_hash,
    }
    begin_folder(folder, format=LATENT_FORMAT, settings=settings)
    publish_model(autoencoder, folder / "autoencoder")
    publish_model(conditioner, folder / "conditioner")
    with ShardWriter(folder / "shard-00000.tar") as writer:
        for i, latent in enumerate(latents):
            uid = f"object-{i}"
            shown = text_members(conditioner, CAPTIONS[i], text) | image_members(conditioner, 60 * i, image)
            meta = {"uid": uid, "captions": [CAPTIONS[i]], "split": "train"}
            writer.write(uid, encode_latent_sample(LatentSample(uid, latent, **shown), meta), "train")
    rows = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    write_manifest(
        folder,
        format=LATENT_FORMAT,
        settings=settings,
        shards=[writer.info],
        counts={"samples": len(latents)},
        extra={"latent_mean": rows.mean(0).tolist(), "latent_std": rows.std(0).tolist()},
    )
    return folder


def text_members(conditioner: AnyConditioner, caption: str, there: bool) -> dict[str, np.ndarray]:
    if not there:
        return {"text_tokens": np.zeros((0, 0, 0)), "text_lengths": np.zeros(0), "text_pooled": np.zeros((0, 0))}
    features = conditioner.encode_text([caption])
    lengths = features.mask.sum(-1).numpy()
    return {"text_tokens": features.tokens.numpy(), "text_lengths": lengths, "text_pooled": features.pooled.numpy()}


def image_members(conditioner: AnyConditioner, grey: int, there: bool) -> dict[str, np.ndarray]:
    if not there:
        return {"image_tokens": np.zeros((0, 0, 0)), "image_pooled": np.zeros((0, 0))}
    features = conditioner.encode_image(np.full((1, 32, 32, 3), grey, np.uint8))
    return {"image_tokens": features.tokens.numpy(), "image_pooled": features.pooled.numpy()}


def write_pipeline(
    folder: Path, prediction: str, autoencoder: Autoencoder, conditioner: AnyConditioner, **settings
) -> Path:
    """A pipeline folder with a denoiser of random weights; the data predicted as in Shap-E, with no statistics."""
    torch.manual_seed(0)
    shap_e = {"conditions": ["text_pooled"], "absent": "zeros", "token_kinds": False, "norm_in": True}
    shap_e |= {"time_scale": 1024.0, "qk_norm": False, "adaln": False}
    sizes = {"width": 48, "heads": 2, "layers": 2, "text_width": 32, "image_width": 256, "pooled_width": 24}
    flow = {"latent_mean": [0.1] * C, "latent_std": [0.5] * C}
    denoiser = Denoiser(
        n_latents=L,
        channels=C,
        prediction=prediction,
        autoencoder_hash=weights_hash(autoencoder),
        conditioner_hash=conditioner.weights_hash,
        **{**sizes, **(shap_e if prediction == "sample" else flow), **settings},
    ).eval()
    torch.nn.init.normal_(denoiser.latent_out.weight, std=0.02)
    scheduler = shap_e_scheduler() if prediction == "sample" else FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    publish_pipeline(ShapeloomPipeline(autoencoder, denoiser, conditioner, scheduler), folder)
    return folder
