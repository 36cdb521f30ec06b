"""A transformers model that says in words what is in a picture: the captioner of `shapeloom data caption`.

What AutoModelForImageTextToText knows is taken: BLIP, BLIP-2, GIT, vision-encoder-decoders (ViT-GPT2), and the chat
models that read pictures. Weights are safetensors alone, and no code is run that comes with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from ..errors import UserError

__all__ = ["CHAT_PROMPT", "ImageToText"]

CHAT_PROMPT = "What is this object? Answer with one short phrase that names it and its colours, such as 'a red chair'."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ImageToText:
    """Words for pictures, without chance: greedy search, or beams.

    Args:
        model: a folder of transformers, or a model's name.
        prompt: what the captions begin with ("a picture of"; it is taken off them), or for a chat model what it is
            asked, CHAT_PROMPT by default.
        beams: 1 is greedy search.
        max_tokens: of an answer.
        device: cuda, mps or cpu by default, the first there is.
        dtype: float32, float16 or bfloat16; by default float32 on a CPU and what the weights have elsewhere.
        allow_download: fetch a model that is not on this machine.
    Raises: UserError for a model that is not there, is of another kind, is incomplete, or has pickles for weights.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prompt: str | None = None,
        beams: int = 1,
        max_tokens: int = 40,
        device: str | None = None,
        dtype: str | None = None,
        allow_download: bool = False,
    ) -> None:
        self.name, self.beams, self.max_tokens = str(model), beams, max_tokens
        self.device = _device(device)
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"--dtype must be {', '.join(DTYPES)}, got '{dtype}'")
        there = _place(model)
        with _quiet():
            self.model = _model(there, self.device, dtype, allow_download)
            self.images, self.words, self.both = _processors(there, self.name, allow_download)
        self.chats = bool(getattr(self.both, "chat_template", None))
        self.prompt = CHAT_PROMPT if self.chats and prompt is None else prompt
        if prompt is not None and self.model.config.model_type == "vision-encoder-decoder":
            raise UserError(f"{self.name} is a vision-encoder-decoder, which takes no --prompt: leave it out")

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """What the model says of each RGB picture, as it says it; the prompt is not repeated.

        Raises: UserError where the model cannot read such pictures, or the device's memory is too small.
        """
        try:
            with _quiet(), torch.inference_mode():
                given = self._inputs(list(pictures)).to(self.device, self.model.dtype)
                ids_NT = self.model.generate(
                    **given, do_sample=False, num_beams=self.beams, max_new_tokens=self.max_tokens
                )
                return [self._without_prompt(text) for text in self._decoded(ids_NT, given.get("input_ids"))]
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.device} has too little memory for {len(pictures)} pictures at once: give a smaller --batch"
            ) from None
        except Exception as error:  # each model has its own ways to refuse its input
            hint = "" if self.prompt else "; if it is a model that is told what to do, give --prompt"
            raise UserError(f"{self.name} cannot caption the pictures ({_first_line(error)}){hint}") from error

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        if self.chats:
            asked = {"type": "text", "text": self.prompt}
            chats = [[{"role": "user", "content": [{"type": "image", "image": p}, asked]}] for p in pictures]
            return self.both.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        if self.both is None or self.prompt is None:
            return self.images(images=pictures, return_tensors="pt")
        given = self.both(images=pictures, text=[self.prompt] * len(pictures), return_tensors="pt")
        if (
            self.model.config.model_type == "git"
        ):  # whose tokenizer ends the text, so that there would be no more to say
            given = type(given)({k: v[:, :-1] if k in ("input_ids", "attention_mask") else v for k, v in given.items()})
        return given

    def _decoded(self, ids_NT: torch.Tensor, prompt_NT: torch.Tensor | None) -> list[str]:
        """Texts of the new tokens; decoders alone give the prompt's back before them."""
        if prompt_NT is not None and torch.equal(ids_NT[:, : prompt_NT.shape[1]], prompt_NT):
            ids_NT = ids_NT[:, prompt_NT.shape[1] :]
        return list(self.words.batch_decode(ids_NT, skip_special_tokens=True))

    def _without_prompt(self, text: str) -> str:
        begin = " ".join((self.prompt or "").split())
        text = " ".join(text.split())
        return text[len(begin) :].strip() if begin and text.casefold().startswith(begin.casefold()) else text


def _device(name: str | None) -> torch.device:
    if name is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({_first_line(error)})") from None


def _place(model: str | Path) -> str:
    """The folder, or the name. Raises UserError for a folder that has no model in it."""
    path = Path(model).expanduser()
    if path.is_file():
        raise UserError(f"the model {model} is a file: give the folder it is in, with config.json and safetensors")
    if not path.is_dir():
        if isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~")) or len(path.parts) > 2:
            raise UserError(f"the model folder {model} does not exist")
        return str(model)
    if not (path / "config.json").is_file():
        raise UserError(f"{model} has no config.json: give a folder as transformers' save_pretrained writes it")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{model} has no safetensors: pickled weights could run code, so they are not read; load the model once "
            f"in a place you trust and save it with save_pretrained"
        )
    return str(path)


def _model(there: str, device: torch.device, dtype: str | None, allow_download: bool) -> Any:
    chosen: Any = DTYPES[dtype] if dtype else torch.float32 if device.type == "cpu" else "auto"
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            there,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=not allow_download,
            dtype=chosen,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds
        raise UserError(_not_loaded(there, error, allow_download)) from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{there} is incomplete: {len(missing)} of its weights are missing, such as {missing[0]}")
    return model.to(device).eval()


def _not_loaded(there: str, error: Exception, allow_download: bool) -> str:
    said = _first_line(error)
    if Path(there).is_dir():
        if isinstance(error, ValueError) and "configuration class" in said:
            return f"{there} is not a model that makes text of pictures: give a BLIP, GIT, ViT-GPT2 or the like"
        return f"{there} cannot be read as a model that makes text of pictures ({said})"
    if allow_download:
        return f"the model '{there}' cannot be fetched and read ({said})"
    return (
        f"the model '{there}' is no folder, and no model of that name is on this machine: give a folder, or "
        f"--allow-download to fetch it"
    )


def _processors(there: str, name: str, allow_download: bool) -> tuple[Any, Any, Any]:
    """What prepares pictures, what decodes tokens, and what prepares both together (None where there is none)."""
    options = {"trust_remote_code": False, "local_files_only": not allow_download}
    try:
        both = AutoProcessor.from_pretrained(there, **options)
        if hasattr(both, "tokenizer") and hasattr(both, "image_processor"):
            images, words = both, both.tokenizer
        else:  # vision-encoder-decoders have no processor of their own
            images, words = (part.from_pretrained(there, **options) for part in (AutoImageProcessor, AutoTokenizer))
            both = None
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"{name}: its processor cannot be read ({_first_line(error)}); a model folder holds its tokenizer and "
            f"preprocessor_config.json too"
        ) from None
    if len(words) <= len(words.all_special_tokens):  # what transformers makes where there are no files of one
        raise UserError(f"{name} has no tokenizer: its files, such as tokenizer.json, belong in the model's folder")
    words.padding_side = "left"  # answers begin where prompts end
    if words.pad_token is None:
        words.pad_token = words.eos_token
    return images, words, both


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks and bars, which come with every batch."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
