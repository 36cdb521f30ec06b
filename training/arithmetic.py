"""What a training will take, before it is started: parameters, operations, and memory of a rank.

Parameters and activations are those of the model itself, built and run once without any memory (fake tensors);
operations are counted by hand. Sizes are bytes, weights and their averages float32 as in training/loop.py.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..models.denoiser import Denoiser
from .objectives import prediction_loss

__all__ = [
    "Flops",
    "Layout",
    "Memory",
    "Sizes",
    "StepMemory",
    "denoiser_flops",
    "evaluation_memory",
    "memory_per_rank",
    "sizes_of",
    "step_memory",
]

Layout = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
FLOAT = 4  # bytes
ZERO_BUCKET = 500_000_000  # numbers in DeepSpeed's buffer for gradients under way: its default reduce_bucket_size
ZERO_LIVE = 1_000_000_000  # gathered weights ZeRO-3 keeps: its default stage3_max_live_parameters


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, those that train, those of the largest transformer block, those in no block."""

    parameters: int
    trained: int
    block: int
    root: int


def sizes_of(model: nn.Module) -> Sizes:
    """Works on any device, meta and fake ones too."""
    every = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in getattr(model, "blocks", [])]
    return Sizes(
        parameters=every,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        block=max(blocks, default=0),
        root=every - sum(blocks),
    )


# --- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample's forward pass, in matrix products and attention alone.

    forward: all; again: those that gradient checkpointing makes once more. A multiplication and its addition are two.
    """

    forward: int
    again: int

    def training(self, *, checkpointing: bool = False) -> int:
        """Of forward and backward pass: a product's two gradients cost twice the product.

        Leave `checkpointing` out for model-flop utilisation (PaLM, arXiv 2204.02311, appendix B), which counts no
        operation twice. What fused attention computes again within its backward pass is never counted.
        """
        return 3 * self.forward + (self.again if checkpointing else 0)


def denoiser_flops(
    config: Mapping[str, Any], *, text_tokens: int = 1, image_tokens: int = 1, n_latents: int | None = None
) -> Flops:
    """Of `models.denoiser.Denoiser` with these settings.

    With width D and N tokens (noise level, conditions, n latent tokens of width c), a block is 12·N·D² multiply-adds in
    matrices (query, key, value and output 4, MLP 8) and 2·N²·D in attention. Around them: the noise level's MLP 8·D²,
    each condition token its width times D, the modulation 6·D², the latents in and out 2·n·c·D. Checkpointing makes the
    blocks again, up to the last product whose result a gradient needs: the MLP's second only where it is modulated.

    Args:
        config: the model's settings, as in its config.json.
        text_tokens, image_tokens: in the prefix of one sample, where the model reads them.
        n_latents: latent tokens of a sample, where they are not those of the settings.
    """
    width, conditions = config["width"], config["conditions"]
    tokens, token_width = (n_latents or config["n_latents"]) // config["patch"], config["channels"] * config["patch"]
    prefix = {"text_pooled": 1, "image_pooled": 1, "text_tokens": text_tokens, "image_tokens": image_tokens}
    widths = {"text_tokens": config["text_width"], "image_tokens": config["image_width"]}
    length = 1 + sum(prefix[name] for name in conditions) + tokens
    blocks = config["layers"] * (12 * length * width**2 + 2 * length**2 * width)
    again = blocks if config["adaln"] else blocks - config["layers"] * 4 * length * width**2
    around = 8 * width**2 + 2 * tokens * token_width * width + (6 * width**2 if config["adaln"] else 0)
    around += sum(prefix[name] * widths.get(name, config["pooled_width"]) * width for name in conditions)
    return Flops(forward=2 * (blocks + around), again=2 * again)


# --- memory of a step ------------------------------------------------------------------------------------------------


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and the program still holds; `peak` is the most at any moment."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, out)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:  # not a view of what is known
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class StepMemory:
    """Of forward and backward pass of a rank's part of a batch.

    sizes: of the model. batch: bytes of latents, noise and conditions. peak: of all else that is held at the fullest
    moment, whole gradients included where `gradients_stay`.
    """

    sizes: Sizes
    batch: int
    peak: int


def step_memory(
    settings: Mapping[str, Any],
    *,
    batch: int,
    text_tokens: int = 1,
    image_tokens: int = 1,
    checkpointing: bool = False,
    precision: str = "no",
    parts: int = 1,
    gradients_stay: bool = True,
) -> StepMemory:
    """Run a step of `Denoiser(**settings)` on fake tensors and watch what is held; takes seconds, and no memory.

    So activations, gradients under way, and the casts that autocast keeps are what torch's own graph holds. What a
    kernel uses inside itself is not seen.

    Args:
        batch: samples of one accumulated part on this rank.
        precision: `bf16` and `fp16` run under autocast, as in training.
        parts: accumulated; from the second on, whole gradients are held from the start.
        gradients_stay: False where a gradient is spread over the ranks as soon as it is there (FSDP2, ZeRO-2 and 3).
    """
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says which norms have no fused kernel
        model = Denoiser(**settings)
        sizes = sizes_of(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        if not gradients_stay:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        tensors = _batch(model, batch, text_tokens, image_tokens)
        live = _LiveBytes([*model.parameters(), *model.buffers(), *tensors.values()])
        if precision != "no":  # as accelerate does it
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
        with live:
            for _ in range(min(parts, 2)):
                loss_B, _ = prediction_loss(model, tensors, prediction=model.config.prediction)
                loss_B.mean().backward()
                del loss_B
        return StepMemory(sizes, sum(value.nbytes for value in tensors.values()), live.peak)


def evaluation_memory(settings: Mapping[str, Any], *, samples: int, text_tokens: int = 1, image_tokens: int = 1) -> int:
    """Bytes that evaluating the loss of `samples` at once holds beside the weights, in float32 and without a graph."""
    with FakeTensorMode(), torch.no_grad():
        model = Denoiser(**settings)
        live = _LiveBytes([*model.parameters(), *model.buffers()])
        with live:
            tensors = _batch(model, samples, text_tokens, image_tokens)
            prediction_loss(model, tensors, prediction=model.config.prediction)
        return live.peak


def _batch(model: Denoiser, batch: int, text_tokens: int, image_tokens: int) -> dict[str, torch.Tensor]:
    """As training/denoiser.py collates it; a model that reads no text (or image) gets one token of it."""
    config = model.config
    text = text_tokens if "text_tokens" in config.conditions else 1
    image = image_tokens if "image_tokens" in config.conditions else 1
    latent = torch.zeros(batch, config.n_latents, config.channels)
    return {
        "latent": latent,
        "noise": torch.zeros_like(latent),
        "time": torch.zeros(batch),
        "signal_power": torch.ones(batch),
        "text_tokens": torch.zeros(batch, text, config.text_width),
        "text_mask": torch.ones(batch, text, dtype=torch.bool),
        "text_pooled": torch.zeros(batch, config.pooled_width),
        "has_text": torch.ones(batch, dtype=torch.bool),
        "image_tokens": torch.zeros(batch, image, config.image_width),
        "image_pooled": torch.zeros(batch, config.pooled_width),
        "has_image": torch.ones(batch, dtype=torch.bool),
    }


# --- memory of a rank ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by what they hold, on its device and, where that is a GPU, in its host's memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def memory_per_rank(
    step: StepMemory,
    layout: Layout,
    ranks: int,
    *,
    reshard: bool = True,
    offload_optimiser: bool = False,
    offload_weights: bool = False,
    evaluation: int = 0,
) -> Memory:
    """What a rank holds at the fullest moment of a step, in a layout of training/parallel.py.

    weights, gradients, AdamW (its two averages), EMA: float32; a rank has its part of those that the layout spreads.
    activations: what a step's forward and backward hold beyond whole gradients. Gradients take the place of
        activations as the backward pass goes on, so that with few samples little is left to count here.
    exchange: DDP: a copy of the gradients, in the buckets it sends them in. FSDP2: the weights outside the blocks,
        which stay gathered, two blocks (one at work, the next on its way) and as much of gradients on their way out;
        all weights where blocks are not let go of. ZeRO: its bucket of gradients;
        in ZeRO-1 the rank's own part of the averaged gradients; in ZeRO-3 the gathered weights, which it keeps up to
        its limit.
    weights for AdamW: ZeRO has the rank's own part of the weights once more, which AdamW updates.
    between steps: what evaluating, or gathering the rank's share of a state, takes beyond what a step leaves free.
    saving (host): the rank's share of a state, copied there to be written while training goes on.
    evaluation (host): on the main rank, where weights are in shards: they are gathered and evaluated there.
    """
    sizes, n = step.sizes, ranks
    in_shards = layout in ("fsdp2", "zero3")
    spread = {"one": (), "ddp": (), "zero1": ("AdamW",), "zero2": ("AdamW", "gradients")}
    counts = {"weights": sizes.parameters, "gradients": sizes.trained, "AdamW": 2 * sizes.trained, "EMA": sizes.trained}
    held = {
        name: FLOAT * (-(-count // n) if name in spread.get(layout, tuple(counts)) else count)
        for name, count in counts.items()
    }
    state = FLOAT * (sizes.parameters + 3 * sizes.trained)
    gathered = {"one": 0, "ddp": 0, "zero1": 2 * FLOAT * sizes.trained, "zero2": 2 * FLOAT * sizes.trained}
    whole_gradients = layout in ("one", "ddp", "zero1")
    held["activations"] = step.peak - (held["gradients"] if whole_gradients else 0)
    held["exchange"] = _exchange(sizes, layout, n, reshard=reshard)
    held["latents"] = step.batch
    held["weights for AdamW"] = FLOAT * -(-sizes.trained // n) if layout.startswith("zero") else 0
    between = max(0 if in_shards else evaluation, gathered.get(layout, state) // n)
    held["between steps"] = max(0, between - held["gradients"] - held["activations"])
    host = {"saving": state // n}
    if in_shards:
        host["evaluation"] = FLOAT * sizes.parameters + evaluation
    if offload_optimiser:
        host |= {name: held.pop(name) for name in ("gradients", "AdamW", "weights for AdamW")}
    if offload_weights:
        host |= {name: held.pop(name) for name in ("weights", "EMA")}
    return Memory(*({name: size for name, size in part.items() if size} for part in (held, host)))


def _exchange(sizes: Sizes, layout: Layout, ranks: int, *, reshard: bool) -> int:
    sums: dict[Layout, Callable[[], int]] = {
        "one": lambda: 0,
        "ddp": lambda: FLOAT * sizes.trained,
        "fsdp2": lambda: FLOAT * (sizes.root + 4 * sizes.block if reshard else sizes.parameters + 2 * sizes.block),
        "zero1": lambda: FLOAT * (ZERO_BUCKET - (-sizes.trained // ranks)),
        "zero2": lambda: FLOAT * ZERO_BUCKET,
        "zero3": lambda: FLOAT * (ZERO_BUCKET + min(sizes.parameters, ZERO_LIVE)),
    }
    return sums[layout]()
