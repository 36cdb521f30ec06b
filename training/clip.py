"""Stage: a small CLIP on rendered views and captions, as the denoiser's conditioner or as an independent judge.

accelerate launch -m shapeloom.training.clip --preset tiny --data raw/ --out runs/clip
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F

from ..checkpoints.clip import publish_clip
from ..config import Config
from ..data_pipes.fingerprint import data_fingerprint
from ..data_pipes.grammar import Level, SceneSpec, near_misses, parse
from ..data_pipes.loader import RawDataset, RawSample
from ..data_pipes.render import composite
from ..errors import UserError
from ..files import canonical_json
from ..models.conditioner import Conditioner
from .held_out import held_out_split
from .loop import Batch, Stage, fit
from .raw_data import RawRunConfig, first_samples, raw_batches, training_data

__all__ = ["ClipRun", "build", "contrastive_loss", "run", "train_tokenizer"]


class ClipModelConfig(Config):
    """open_clip's `model_cfg`, without the tokenizer, which is trained on the captions."""

    embed_dim: int = 128
    vision_cfg: dict[str, Any] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
    text_width: int = 128
    text_heads: int = 4
    text_layers: int = 3
    context_length: int = 32
    vocab_size: int = 512


class ClipRun(RawRunConfig):
    model: ClipModelConfig = ClipModelConfig()
    n_swaps: int = 2  # swapped captions a sample as further negatives: without them a CLIP is nearly blind to order
    # Captions wrong in one word, made of a procedural sample's meaning: a batch rarely has them, a pool of 1,000 does.
    # Not for a CLIP that must not know what is held out: they would name it.
    n_near: int = 0
    eval_samples: int = 200


def run(config: ClipRun, *, resume: str = "auto") -> None:
    """Train, then leave an open_clip folder in `<out>/clip`."""
    fit(config, build(config), resume=resume)


def build(config: ClipRun) -> Stage:
    torch.manual_seed(config.seed)
    train = training_data(config, ("pictures",))
    if len(train) < 2:
        raise UserError(f"{config.data} has {len(train)} training samples; a CLIP needs many to tell apart")
    held_out = held_out_split(train)
    texts = (text for sample in first_samples(config, train) for text in texts_of(sample.meta))
    tokenizer = train_tokenizer(texts, config.model.vocab_size)
    model = Conditioner(**clip_config(config.model, tokenizer), name=Path(config.out).name)

    level = train.shards.manifest["settings"].get("level", "core")

    @functools.lru_cache(maxsize=1 << 18)  # captions come again each epoch, and samples share theirs
    def tokens(text: str) -> torch.Tensor:
        return model.tokenize([text])[0]

    def collate(items: list[tuple[RawSample, np.random.Generator]]) -> Batch:
        return collate_pairs(items, model, tokens, config.n_swaps, config.n_near, level)

    def loss(wrapped: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        texts_BKT = batch["texts"]
        out = wrapped(batch["images"], texts_BKT.flatten(0, 1))
        text_BKE = out["text_features"].unflatten(0, texts_BKT.shape[:2])
        loss_B = contrastive_loss(
            out["image_features"], text_BKE, out["logit_scale"], batch["present"], batch["meaning"]
        )
        return loss_B, {}

    return Stage(
        name=Path(config.out).name,
        model=model,
        loss=loss,
        batches=raw_batches(config, train, collate),
        evaluate=lambda ema, step: evaluate(ema, held_out, config.eval_samples),
        publish=lambda ema: publish_clip(ema, Path(config.out) / "clip"),
        data=data_fingerprint(train),
    )


def clip_config(config: ClipModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """`Conditioner`'s arguments."""
    text_cfg = {
        "context_length": config.context_length,
        "vocab_size": tokenizer.get_vocab_size(),
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "hf_tokenizer_name": "tokenizer.json",  # tells open_clip that the tokenizer lies in the same folder
    }
    return {
        "model_cfg": {"embed_dim": config.embed_dim, "vision_cfg": config.vision_cfg, "text_cfg": text_cfg},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "tokenizer_json": tokenizer.to_str(),
    }


def train_tokenizer(captions: Any, vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the captions: any text has tokens, and the captions' words are mostly one each.

    Ids: 0 pads; the end token is the highest, where open_clip's pooling looks for it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=["<pad>", "<start>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(["<end>"])
    special = [(name, tokenizer.token_to_id(name)) for name in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    return tokenizer


def collate_pairs(
    items: list[tuple[RawSample, np.random.Generator]],
    model: Conditioner,
    tokens: Callable[[str], torch.Tensor],
    n_swaps: int,
    n_near: int = 0,
    level: Level = "core",
) -> Batch:
    """One frontal view and one caption of each sample, with wrong captions of it beside them.

    Args:
        tokens: a text's ids, [T].
        n_swaps, n_near: of its swapped captions and of its near misses (in the words of `level`), at most.
    Returns: images [B, 3, H, W]; texts [B, K, T] token ids, K - 1 of them wrong; present [B, K]; meaning [B, K] ids,
    equal where captions mean the same.
    """
    images, texts, meanings = [], [], []
    for sample, rng in items:
        # Frontal views come first; of the others, captions that speak of left and right are not true.
        images.append(composite(sample.picture(int(rng.integers((len(sample.pictures or ()) + 1) // 2)))))
        caption = str(rng.choice(sample.captions))
        others = [swap["caption"] for swap in sample.meta.get("swaps", [])]
        others = [others[k] for k in rng.permutation(len(others))[:n_swaps]]
        if n_near and "spec" in sample.meta:
            others += near_misses(SceneSpec.from_json(sample.meta["spec"]), level, rng, n_near)
        texts.append([caption, *others])
        meanings.append([meaning_id(text) for text in texts[-1]])
    width = 1 + n_swaps + n_near
    present = torch.tensor([[k < len(row) for k in range(width)] for row in texts])
    ids = torch.stack([tokens(text) for row in texts for text in row + [""] * (width - len(row))])
    meaning = torch.tensor([row + [0] * (width - len(row)) for row in meanings])
    return {
        "images": model.prepare(np.stack(images)),
        "texts": ids.unflatten(0, (len(items), width)),
        "present": present,
        "meaning": meaning,
    }


def contrastive_loss(
    image_BE: torch.Tensor,
    text_BKE: torch.Tensor,
    scale: torch.Tensor,
    present_BK: torch.Tensor,
    meaning_BK: torch.Tensor,
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020, fig. 3) with further negatives (NegCLIP, arXiv 2210.01936).

    An image is matched against all captions of the batch, its own and the others' swaps among them; a caption
    against all images. Captions of equal meaning are no negatives of each other.

    Args: unit embeddings; text 0 of each row belongs to the image. All ranks' batches count together.
    Returns: [B].
    """
    images, texts = gather(image_BE), gather(text_BKE)
    present, meaning = gather(present_BK), gather(meaning_BK)
    start = len(image_BE) * (torch.distributed.get_rank() if len(images) > len(image_BE) else 0)
    own = torch.arange(len(image_BE), device=image_BE.device)

    to_text = scale * image_BE @ texts.flatten(0, 1).T
    equal = meaning_BK[:, :1] == meaning.flatten()[None]
    equal[own, (start + own) * texts.shape[1]] = False  # the positive itself stays
    to_text = to_text.masked_fill(equal | ~present.flatten(), float("-inf"))
    to_image = scale * text_BKE[:, 0] @ images.T
    equal = meaning_BK[:, :1] == meaning[None, :, 0]
    equal[own, start + own] = False
    to_image = to_image.masked_fill(equal, float("-inf"))
    return 0.5 * (
        F.cross_entropy(to_text, (start + own) * texts.shape[1], reduction="none")
        + F.cross_entropy(to_image, start + own, reduction="none")
    )


def gather(x: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, in rank order; gradients flow back to the rank they came from."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    if x.is_floating_point():
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x))
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x)
    return torch.cat(parts)


@functools.lru_cache(maxsize=1 << 20)
def meaning_id(caption: str) -> int:
    """Equal for captions of equal meaning, where the grammar of the procedural set can tell; else of equal text."""
    try:
        meaning = canonical_json(parse(caption).to_json())
    except UserError:
        meaning = caption
    return int.from_bytes(hashlib.sha256(meaning.encode()).digest()[:8], "big", signed=True)


def texts_of(meta: dict[str, Any]) -> list[str]:
    return [*meta["captions"], *(swap["caption"] for swap in meta.get("swaps", []))]


@torch.no_grad()
def evaluate(model: Conditioner, dataset: RawDataset, count: int) -> dict[str, float]:
    """R@1 of held-out images among their captions, and how often the caption beats each of its swaps."""
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    image = model.encode_image(np.stack([composite(sample.picture(0)) for sample in samples])).pooled
    caption = model.encode_text([sample.captions[0] for sample in samples]).pooled
    scores = image @ caption.T
    meanings = [meaning_id(sample.captions[0]) for sample in samples]
    hits = [meanings[int(best)] == meanings[i] for i, best in enumerate(scores.argmax(dim=-1))]
    swaps = [(i, swap["caption"]) for i, sample in enumerate(samples) for swap in sample.meta.get("swaps", [])]
    metrics = {"r1": float(np.mean(hits))}
    if swaps:
        swapped = model.encode_text([text for _, text in swaps]).pooled
        index = torch.tensor([i for i, _ in swaps])
        metrics["order"] = ((image[index] * swapped).sum(-1) < scores.diagonal()[index]).float().mean().item()
    return metrics


if __name__ == "__main__":
    from .stages import main

    main("clip")
