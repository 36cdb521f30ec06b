"""Where an evaluator's files lie on this machine: a folder, a weights file, or the hub's cache; offline unless asked.

Nothing is handed on by a hub name: what is found here are paths, and what reads them later is given paths alone.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...files import read_json

__all__ = [
    "BUNDLED_JUDGE",
    "CLIP_CONFIG",
    "CLIP_WEIGHTS",
    "CONFIG",
    "JUDGE",
    "WEIGHTS",
    "Found",
    "bundled_judge",
    "cached",
    "find",
    "hub_tokenizer",
    "published_config",
    "quick_gelu_mistake",
    "told_pretraining",
]

JUDGE = "judge"
BUNDLED_JUDGE = Path(__file__).resolve().parents[2] / "checkpoints" / "bundled" / "judge"

CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OTHER_FILES = ("vocab.json", "merges.txt", "spiece.model", "preprocessor_config.json", "processor_config.json")
OURS = ("Conditioner", "TransformersConditioner")
OTHERS = ("clip", "siglip")  # of transformers' model types

Layout = Literal["open_clip", "ours", "transformers", "weights"]

SHORTEST_TAG = 5  # shorter ones of open_clip's ("v1", "meta") are words of any file name


@dataclass(frozen=True)
class Found:
    """A CLIP's files.

    Args:
        layout: "open_clip", "ours" or "transformers" folders, or a lone "weights" file.
        path: the folder, or the file.
        architecture: of a lone file, open_clip's name of it.
        pretraining: open_clip's tag, where the source names it.
        hints: names that may tell the pre-training: the folder's, the file's, the hub repository's.
        source: the path, or the name where the path is the hub cache's own business.
        reference: the hub cache's file that says which version the name stands for.
    """

    layout: Layout
    path: Path
    source: str
    architecture: str | None = None
    pretraining: str | None = None
    hints: tuple[str, ...] = ()
    reference: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All that the evaluator depends on: a change of any makes it another one."""
        folder = self.path if self.path.is_dir() else self.path.parent
        every = sorted(path for path in folder.iterdir() if path.is_file()) if self.path.is_dir() else [self.path]
        if self.layout == "weights":
            every += [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        return every + ([self.reference] if self.reference else [])


def find(source: str, *, allow_download: bool = False) -> Found:
    """The files of an evaluator; see `evaluators` for what `source` may be.

    Raises: UserError if it is nothing of the kind, or its files are not on this machine.
    """
    if source == JUDGE:
        return _folder(bundled_judge())
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        raise UserError(f"{source} is a file: name its open_clip architecture too, as in ViT-B-32={source}")
    if "=" in source:
        return _weights_file(*source.split("=", 1))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        name, tag = source.split("/")
        config = _model_config(name)
        return _from_hub(source, allow_download) if config is None else _named(name, tag, config, allow_download)
    raise UserError(
        f"{source} is no evaluator: give a CLIP's folder, ARCH=FILE.safetensors, NAME/PRETRAINED of open_clip, "
        f"an id of the hub, judge or tiny-colours"
    )


def bundled_judge() -> Path:
    """The folder of the CLIP for the procedural reference set. Raises UserError if this copy comes without."""
    if not (BUNDLED_JUDGE / CLIP_CONFIG).is_file():
        raise UserError(
            f"this copy of shapeloom comes without its judge ({BUNDLED_JUDGE} is not there): name another evaluator"
        )
    return BUNDLED_JUDGE


def cached(repository: str, *names: str) -> Path | None:
    """The first of the named files that the hub's cache has; never a look at the network."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    return None


def _folder(path: Path, source: str = "", hints: tuple[str, ...] = (), reference: Path | None = None) -> Found:
    """A local folder, by what is in it."""
    real = path.resolve()
    hints += (real.name, *(part for part in real.parts if part.startswith("models--")))

    def found(layout: Layout) -> Found:
        return Found(layout, path, source or str(real), hints=hints, reference=reference)

    if (path / CLIP_CONFIG).is_file():
        return found("open_clip")
    config: Any = read_json(path / CONFIG, "model config") if (path / CONFIG).is_file() else {}
    config = config if isinstance(config, dict) else {}
    if config.get("_class_name") in OURS:
        return found("ours")
    if config.get("model_type") in OTHERS:
        return found("transformers")
    if (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is a pipeline, not a CLIP: its own is {path / 'conditioner'}, which should not judge it"
        )
    kind = config.get("_class_name") or config.get("model_type")
    reason = f"{CONFIG} is of a {kind}" if kind else f"it has neither {CLIP_CONFIG} nor a {CONFIG} of a CLIP"
    raise UserError(f"{path} is not a folder of a CLIP: {reason}")


def _weights_file(architecture: str, file: str) -> Found:
    path = Path(file).expanduser()
    if _model_config(architecture) is None:
        raise UserError(
            f"{architecture}={file}: open_clip has no architecture {architecture}; it has {_like(architecture)}"
        )
    if not path.is_file():
        raise UserError(f"{architecture}={file}: the file {file} does not exist")
    return Found("weights", path, f"{architecture}={path.resolve()}", architecture, hints=(path.name,))


def _named(name: str, tag: str, config: dict[str, Any], allow_download: bool) -> Found:
    """NAME/PRETRAINED of open_clip, from the hub's cache."""
    import open_clip

    published = open_clip.get_pretrained_cfg(name, tag)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"open_clip knows no weights {tag} of {name}; it knows {tags}")
    source = f"{name}/{tag}"
    # Before the files are asked for: nobody should fetch them for a name that will be refused.
    if mistake := quick_gelu_mistake(name, tag, has_quick_gelu=bool(config.get("quick_gelu"))):
        raise UserError(f"{source}: {mistake}")
    repository, _, file = published["hf_hub"].rpartition("/")
    names = [file.rsplit(".", 1)[0] + ".safetensors", file] if file else [CLIP_WEIGHTS, "open_clip_pytorch_model.bin"]
    path = cached(repository, *names) or (_download(repository, *names) if allow_download else None)
    if path is None:
        raise UserError(
            f"{source} is not on this machine: it needs {names[0]} of {repository} in {_cache_folder(repository)}; "
            f"fetch it with --allow-download, or give the file itself as {name}=FILE"
        )
    hints = (repository.replace(".", "/"),)
    return Found("weights", path, source, name, tag, hints, _reference(path))


def _from_hub(repository: str, allow_download: bool) -> Found:
    """A hub id whose folder is open_clip's or transformers', from the hub's cache."""
    for config, weights in ((CLIP_CONFIG, CLIP_WEIGHTS), (CONFIG, WEIGHTS)):
        path = cached(repository, config)
        if path is not None and cached(repository, weights):
            return _folder(path.parent, repository, (repository,), _reference(path))
    if not allow_download:
        raise UserError(
            f"{repository} is neither a folder nor a model on this machine: as an id of the hub it needs {CONFIG} and "
            f"{WEIGHTS} in {_cache_folder(repository)}; fetch them with --allow-download"
        )
    config_path = _download(repository, CLIP_CONFIG, CONFIG)
    _download(repository, CLIP_WEIGHTS if config_path.name == CLIP_CONFIG else WEIGHTS)
    _download_if_there(repository, *TOKENIZER_FILES, *OTHER_FILES)
    return _folder(config_path.parent, repository, (repository,), _reference(config_path))


def hub_tokenizer(repository: str, *, allow_download: bool = False) -> Path:
    """The folder of a tokenizer in the hub's cache. Raises UserError if it is not there."""
    path = cached(repository, TOKENIZER_FILES[0])
    if path is None and allow_download:
        path = _download(repository, TOKENIZER_FILES[0])
        _download_if_there(repository, *TOKENIZER_FILES[1:])
    if path is None:
        raise UserError(
            f"the tokenizer {repository} is not on this machine: it needs {TOKENIZER_FILES[0]} in "
            f"{_cache_folder(repository)}, or beside the weights; fetch it with --allow-download"
        )
    return path.parent


def _download(repository: str, *names: str) -> Path:
    """The first of the named files that the repository has. Raises UserError if it has none, or cannot be reached."""
    from huggingface_hub import hf_hub_download

    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception as error:  # the hub raises many kinds, those of its transport among them
            reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{names[0]} of {repository} cannot be downloaded ({reason})")


def _download_if_there(repository: str, *names: str) -> None:
    for name in names:
        with contextlib.suppress(UserError):
            _download(repository, name)


def _cache_folder(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _reference(path: Path) -> Path | None:
    """models--…/snapshots/<commit>/<file> to models--…/refs/main."""
    reference = path.parent.parent.parent / "refs" / "main"
    return reference if reference.is_file() else None


def _model_config(architecture: str) -> dict[str, Any] | None:
    import open_clip

    return open_clip.get_model_config(architecture)


def published_config(name: str, tag: str) -> dict[str, Any] | None:
    """open_clip's `model_cfg` of an architecture for which it knows weights of this tag; None where it does not."""
    import open_clip

    return _model_config(name) if tag and open_clip.get_pretrained_cfg(name, tag) else None


def _like(architecture: str) -> str:
    import open_clip

    return ", ".join(difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0) or ["none"])


# --- what names tell -------------------------------------------------------------------------------------------------


def told_pretraining(hints: tuple[str, ...]) -> str | None:
    """open_clip's tag that stands in one of the names as words of its own, the longest if there are several."""
    import open_clip

    tags = {tag for _, tag in open_clip.list_pretrained() if len(tag) >= SHORTEST_TAG}
    names = [f"_{re.sub(r'[^a-z0-9]+', '_', hint.lower())}_" for hint in hints]
    return max((tag for tag in tags if any(f"_{tag}_" in name for name in names)), key=len, default=None)


def quick_gelu_mistake(
    architecture: str | None, tag: str | None, *, has_quick_gelu: bool, setting: str = ""
) -> str | None:
    """What is wrong if weights meet an activation they were not trained with; None if nothing is, or none can tell.

    The features get worse and nothing fails: open_clip #441, #771, #1109.

    Args:
        architecture: open_clip's name, where there is one.
        setting: what a folder's config has to say instead.
    """
    import open_clip

    base = (architecture or "").removesuffix("-quickgelu")
    known = open_clip.is_pretrained_cfg(base, tag or "")
    homes = [base] if known else open_clip.list_pretrained_models_by_tag(tag or "")
    trained = {bool(open_clip.get_pretrained_cfg(home, tag or "").get("quick_gelu")) for home in homes}
    if len(trained) != 1 or has_quick_gelu in trained:
        return None
    right = base if has_quick_gelu else f"{base}-quickgelu"
    fixes = [f"its config must say {setting}"] if setting else []
    fixes += [f"the right architecture is {right}"] if base else []
    how, what = ("without", "with it") if has_quick_gelu else ("with", "without it")
    return f"{tag} weights were trained {how} QuickGELU and give worse features {what}: {', and '.join(fixes)}"
