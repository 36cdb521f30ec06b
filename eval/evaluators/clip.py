"""A CLIP of any family that embeds texts and pictures, and what tells two of them apart.

Shapes: N texts or pictures, T tokens, S image size, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...errors import UserError
from ...files import sha256_json
from ...models.conditioner import LocalTokenizer
from .facts import EvaluatorFacts

__all__ = [
    "TOKENIZER",
    "ClipEvaluator",
    "Preparation",
    "Tensors",
    "Words",
    "embedding_hash",
    "factor",
    "file_words",
    "fill",
    "first_line",
    "tokenizer_identity",
    "tower_hash",
]

PICTURES_AT_ONCE, TEXTS_AT_ONCE = 64, 256
NUMERICS = {"dtype": "float32", "tf32": False}
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
TOKENIZER = "tokenizer.json"
OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}  # beside the weights in OpenAI's own files
PROJECTIONS = ("visual.proj", "text_projection", "text_projection.weight", "visual_projection.weight")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Preparation:
    """A square picture as the image tower takes it: resized with antialiasing, put in [0, 1], normalised."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"

    def __call__(self, images_NHW3: np.ndarray) -> torch.Tensor:
        """u8 to float32 [N, 3, S, S]. Pillow resizes, as the models' own preparations do: the same on every device."""
        if images_NHW3.shape[1] != self.size:
            size, how = (self.size, self.size), RESAMPLING[self.resample]
            images_NHW3 = np.stack([np.asarray(Image.fromarray(image).resize(size, how)) for image in images_NHW3])
        pixels = torch.from_numpy(np.array(images_NHW3)).float().div(255).permute(0, 3, 1, 2)
        mean_311, std_311 = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean_311) / std_311


@dataclass(frozen=True)
class Words:
    """A tokenizer. tokens: texts to the text tower's arguments, long texts cut; count: tokens of a text before that;
    identity: what its ids depend on, for `EvaluatorFacts.hash`."""

    tokens: Callable[[list[str]], Tensors]
    count: Callable[[str], int]
    identity: Any


@dataclass(frozen=True)
class ClipEvaluator:
    """A CLIP of any family; the interface is `evaluator_facts.Evaluator`'s.

    Args:
        module: what holds the weights.
        encode_text: of `words`' tokens; encode_image: of prepared pictures; both to [N, D] of any norm.
        mistake: why it must not score, if it must not.
    """

    facts: EvaluatorFacts
    module: nn.Module
    preparation: Preparation
    words: Words
    encode_text: Callable[..., torch.Tensor]
    encode_image: Callable[[torch.Tensor], torch.Tensor]
    mistake: str | None = None

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings [N, D] of at least one text. Raises UserError where one is not finite."""
        chunks = (list(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE))
        return self._unit("texts", (self.encode_text(**self._placed(self.words.tokens(chunk))) for chunk in chunks))

    def embed_pictures(self, images_NHW3: np.ndarray) -> np.ndarray:
        """Unit embeddings [N, D] of at least one u8 sRGB picture, square. Raises UserError where one is not finite."""
        n, height, width, channels = images_NHW3.shape
        if images_NHW3.dtype != np.uint8 or height != width or channels != 3:
            raise ValueError(f"pictures must be u8 [N, H, H, 3], got {images_NHW3.dtype} {list(images_NHW3.shape)}")
        chunks = (images_NHW3[i : i + PICTURES_AT_ONCE] for i in range(0, n, PICTURES_AT_ONCE))
        pixels = (self._placed({"pixels": self.preparation(chunk)})["pixels"] for chunk in chunks)
        return self._unit("pictures", (self.encode_image(pixels_N3SS) for pixels_N3SS in pixels))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [self.words.count(text) for text in texts]

    def _placed(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        device = next(self.module.parameters()).device
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _unit(self, what: str, features: Iterator[torch.Tensor]) -> np.ndarray:
        with torch.inference_mode(), _full_precision():
            rows_ND = torch.cat(list(features)).float()
            rows_ND = (rows_ND / rows_ND.norm(dim=-1, keepdim=True)).cpu().numpy()
        if bad := int((~np.isfinite(rows_ND)).any(axis=1).sum()):
            raise UserError(
                f"evaluator {self.facts.name} gives {bad} of {len(rows_ND)} {what} an embedding that is not finite: "
                f"its weights are damaged, put a good copy in their place"
            )
        return rows_ND


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32 and autocast, whatever the process has set: they move near ties."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def embedding_hash(weights: str, model: Any, preparation: Preparation, words: Words) -> str:
    """`EvaluatorFacts.hash`. weights: the hash of all tensors; model: what they do not say, such as the activation."""
    parts = {"weights": weights, "model": model, "pictures": asdict(preparation), "words": words.identity}
    return sha256_json({**parts, "numerics": NUMERICS})


def tower_hash(tower: Tensors) -> str:
    """SHA-256 of a tower's tensors without their names and without its projection.

    So open_clip's and transformers' copies of one tower agree, and one that was saved without a projection, too.
    """
    digests = []
    for name, tensor in tower.items():
        if not name.endswith(PROJECTIONS):
            # transformers keeps queries, keys and values apart.
            for part in tensor.chunk(3) if "in_proj_" in name else (tensor,):
                values = part.detach().to("cpu", torch.float32).contiguous().numpy()
                digests.append(hashlib.sha256(values.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def file_words(tokenizer_json: str, context: int) -> Words:
    """A tokenizer of ours."""
    try:
        words = LocalTokenizer(tokenizer_json, context)
    except Exception as error:  # tokenizers raises bare ones
        raise UserError(f"{TOKENIZER} cannot be read ({first_line(error)})") from None
    return Words(
        lambda texts: {"ids_NT": words(texts)},
        lambda text: len(words.tokenizer.encode(text).ids),
        {"json": sha256_json(json.loads(tokenizer_json))},
    )


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """What the ids of a transformers tokenizer depend on, as it was read (each call changes how it pads and cuts)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # the slow ones of transformers 4 have none
    content = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return {"pad": tokenizer.pad_token_id, "content": hashlib.sha256(content.encode()).hexdigest()}


def fill(model: nn.Module, state: dict[str, torch.Tensor], what: str, against: str) -> bool:
    """Put weights into a model that must have room for exactly these; whether they came in OpenAI's own form."""
    if state and all(key.startswith("module.") for key in state):  # saved from distributed training
        state = {key.removeprefix("module."): value for key, value in state.items()}
    from_openai = state.keys() >= OPENAI_EXTRAS
    given = {key: value for key, value in state.items() if not (from_openai and key in OPENAI_EXTRAS)}
    wanted = model.state_dict()
    wrong = []
    for key in sorted(given.keys() | wanted.keys()):
        if key not in given:
            wrong.append(f"{key} is missing")
        elif key not in wanted:
            wrong.append(f"{key} has no place")
        elif given[key].numel() == wanted[key].numel() == 1:
            given[key] = given[key].reshape(wanted[key].shape)  # logit_scale: a scalar or a vector of one
        elif given[key].shape != wanted[key].shape:
            wrong.append(f"{key} is {list(given[key].shape)} and should be {list(wanted[key].shape)}")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{what} does not fit {against}: tensor {wrong[0]}{more}")
    model.load_state_dict(given)
    return from_openai


def factor(logit_scale: torch.Tensor) -> float | None:
    """`EvaluatorFacts.logit_scale`; None for one that is broken."""
    value = float(logit_scale.detach().exp())
    return value if math.isfinite(value) else None


def first_line(error: Exception) -> str:
    """What others' errors say, short enough for a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]
