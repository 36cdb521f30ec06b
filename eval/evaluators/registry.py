"""Any CLIP as an evaluator: describing one, opening one, listing those there are.

A `source` is one of:

- a folder: open_clip's (open_clip_config.json, open_clip_model.safetensors; `checkpoints.clip.publish_clip` writes
  them), a conditioner's of ours, or transformers' (a config.json of "clip" or "siglip", model.safetensors);
- `ARCH=FILE.safetensors`: weights of an open_clip architecture (a .pt or .bin is read without running anything in it);
- `NAME/PRETRAINED` of open_clip (`ViT-B-32-quickgelu/openai`), or an id of the hub
  (`laion/CLIP-ViT-B-32-laion2B-s34B-b79K`): from the hub's cache, and from the network only with `allow_download`;
- `judge`: the CLIP that comes with the package, for its procedural reference set;
- `tiny-colours`: no CLIP at all, see tiny_colours.py.

Torch is imported when a model must be read, not before: a memo makes the second description quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import read_json, write_json
from . import tiny_colours
from .facts import Evaluator, EvaluatorFacts, independence, open_clip_architecture
from .files import BUNDLED_JUDGE, CLIP_CONFIG, CLIP_WEIGHTS, JUDGE, Found, cached, find, published_config

__all__ = [
    "PUBLISHED",
    "Evaluator",
    "EvaluatorFacts",
    "Listed",
    "describe",
    "describe_conditioner",
    "describe_declared",
    "independence",
    "list_evaluators",
    "open_evaluator",
]

MEMO_FORMAT = "shapeloom-evaluators/1"
LICENCE = "MIT"  # of what comes with the package


def open_evaluator(source: str, *, device: str | None = None, allow_download: bool = False) -> Evaluator:
    """Read a CLIP, ready to embed.

    Args:
        source: see the top of this file.
        device: of torch; None for a GPU where there is one.
        allow_download: fetch from the hub what its cache lacks; else the network is never touched.
    Raises: UserError if the source is none, its files are missing, damaged or do not fit their architecture, or the
        weights were trained with another activation than the architecture has (QuickGELU).
    """
    if source == tiny_colours.NAME:
        return tiny_colours.TinyColours()
    from .open_clip_towers import load_evaluator

    found = find(source, allow_download=allow_download)
    return load_evaluator(source, found, device=device, allow_download=allow_download)


def describe(source: str, *, memo: Path | None = None, allow_download: bool = False) -> EvaluatorFacts:
    """What an evaluator is; it is read for that, unless `memo` knows it and its files are what they were.

    Args:
        memo: a JSON file of facts, made if it is missing; a damaged one is made again.
    Raises: UserError as `open_evaluator`.
    """
    if source == tiny_colours.NAME:
        return tiny_colours.tiny_colours_facts()
    if source == JUDGE or Path(source).expanduser().is_dir():
        key = str((BUNDLED_JUDGE if source == JUDGE else Path(source).expanduser()).resolve())
    else:
        architecture, equals, file = source.partition("=")
        key = f"{architecture}={Path(file).expanduser().resolve()}" if equals else source

    def read() -> tuple[EvaluatorFacts, Found]:
        from .open_clip_towers import load_evaluator

        found = find(source, allow_download=allow_download)
        evaluator = load_evaluator(source, found, device="cpu", allow_download=allow_download)
        return evaluator.facts, found

    return replace(_remembered(memo, key, read), name=source)


def describe_declared(source: str, *, memo: Path | None = None, allow_download: bool = False) -> EvaluatorFacts:
    """As `describe`, of a CLIP that is only said to have conditioned a system: names of open_clip need no weights here.

    Without them its architecture and pre-training are known, its weights are not.
    """
    try:
        return describe(source, memo=memo, allow_download=allow_download)
    except UserError:
        facts = published_facts(source)
        if facts is None:
            raise
        return facts


def describe_conditioner(pipeline_folder: str | Path, *, memo: Path | None = None) -> EvaluatorFacts:
    """What the conditioner of a pipeline folder is, with one tower or both; for `independence`.

    Raises: UserError if there is none, or it is damaged.
    """
    folder = Path(pipeline_folder) / "conditioner"
    if not folder.is_dir():
        raise UserError(f"{pipeline_folder} is not a pipeline of shapeloom: it has no folder conditioner")

    def read() -> tuple[EvaluatorFacts, Found]:
        from .open_clip_towers import conditioner_facts

        found = find(str(folder))
        return conditioner_facts(str(folder), found), found

    return replace(_remembered(memo, f"conditioner {folder.resolve()}", read), name=str(folder))


def published_facts(source: str) -> EvaluatorFacts | None:
    """Of open_clip's NAME/PRETRAINED, without its weights; None for anything else."""
    name, _, tag = source.partition("/")
    config = published_config(name, tag)
    if config is None:
        return None
    size = config["vision_cfg"].get("image_size", 224)
    return EvaluatorFacts(
        name=source,
        source=source,
        hash="",
        weights="",
        family="open_clip",
        architecture=open_clip_architecture(config),
        pretraining=tag,
        image_size=size if isinstance(size, int) else size[0],
        context_length=config["text_cfg"].get("context_length", 77),
        mean=(),
        std=(),
        quick_gelu=config.get("quick_gelu"),
        logit_scale=None,
    )


# --- the memo --------------------------------------------------------------------------------------------------------


def _remembered(memo: Path | None, key: str, read: Callable[[], tuple[EvaluatorFacts, Found]]) -> EvaluatorFacts:
    """The facts in the memo if the files they were read from are the same; else those of `read`, which are kept."""
    entries = _entries(memo) if memo is not None else {}
    try:
        entry = entries[key]
        if entry["files"] == _stamps([Path(path) for path in entry["files"]], entry["folder"]):
            return EvaluatorFacts.from_json(entry["facts"])
    except (KeyError, TypeError, OSError):  # not there, or not as we write it
        pass
    facts, found = read()
    if memo is not None:
        folder = str(found.path.resolve()) if found.path.is_dir() else None
        files = _stamps([path.absolute() for path in found.files], folder)
        write_json(memo, {"format": _format(), "evaluators": {**_entries(memo), key: {
            "folder": folder, "files": files, "facts": facts.to_json(),
        }}})  # fmt: skip
    return facts


def _entries(memo: Path) -> dict[str, Any]:
    try:
        content = read_json(memo, "memo of evaluators")
    except UserError:
        return {}
    known = isinstance(content, dict) and content.get("format") == _format()
    return content["evaluators"] if known and isinstance(content.get("evaluators"), dict) else {}


def _format() -> str:
    """A lone weights file means what open_clip's list of architectures says, so its release counts."""
    return f"{MEMO_FORMAT} open_clip {version('open_clip_torch')}"


def _stamps(files: Sequence[Path], folder: str | None) -> dict[str, list[Any]]:
    """Path to (real path, bytes, time of change); of a folder, all its files, so that a new one is seen."""
    files = [*files, *(path for path in sorted(Path(folder).iterdir()) if path.is_file())] if folder else files
    found = {}
    for path in files:
        status = path.stat()
        found[str(path)] = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    return found


# --- the list --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """A row of `eval ls`. here: whether its weights are on this machine; where: their file, or what to do for them."""

    name: str
    architecture: str
    licence: str
    here: bool
    where: str


@dataclass(frozen=True)
class Published:
    """An evaluator of the published protocols. repository: of the hub, with `CLIP_WEIGHTS` in it."""

    name: str
    repository: str
    architecture: str
    licence: str


# OpenAI's are named with their activation: open_clip's plain `ViT-B-32/openai` runs them without it, and is refused.
PUBLISHED = (
    Published("ViT-B-32-quickgelu/openai", "timm/vit_base_patch32_clip_224.openai",
              "ViT-B/32 at 224 + text 12x512 of 77", "MIT"),
    Published("ViT-B-16-quickgelu/openai", "timm/vit_base_patch16_clip_224.openai",
              "ViT-B/16 at 224 + text 12x512 of 77", "MIT"),
    Published("ViT-L-14-quickgelu/openai", "timm/vit_large_patch14_clip_224.openai",
              "ViT-L/14 at 224 + text 12x768 of 77", "MIT"),
    Published("ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
              "ViT-B/32 at 224 + text 12x512 of 77", "MIT"),
    Published("ViT-B-16-SigLIP/webli", "timm/ViT-B-16-SigLIP",
              "vit_base_patch16_siglip_224 at 224 + text 12x768 of 64", "Apache-2.0"),
)  # fmt: skip


def list_evaluators(models: Sequence[str] = (), *, memo: Path | None = None) -> list[Listed]:
    """The bundled evaluators, the published ones, and `models` (sources of the user's, which are described).

    Offline; torch is imported for `models` alone, and only those that `memo` does not know.
    """
    colours = tiny_colours.tiny_colours_facts()
    rows = [Listed(colours.name, colours.architecture, LICENCE, True, "no weights: for tests and dry runs")]
    if (config := BUNDLED_JUDGE / CLIP_CONFIG).is_file():
        architecture = open_clip_architecture(read_json(config, "CLIP config")["model_cfg"])
        rows.append(Listed(JUDGE, architecture, LICENCE, True, str(BUNDLED_JUDGE)))
    else:
        rows.append(Listed(JUDGE, "", LICENCE, False, f"this copy of shapeloom comes without {BUNDLED_JUDGE}"))
    for published in PUBLISHED:
        path = cached(published.repository, CLIP_WEIGHTS)
        where = str(path) if path else f"{CLIP_WEIGHTS} of {published.repository}, by --allow-download"
        rows.append(Listed(published.name, published.architecture, published.licence, path is not None, where))
    return rows + [_described(source, memo) for source in models]


def _described(source: str, memo: Path | None) -> Listed:
    try:
        facts = describe(source, memo=memo)
    except UserError as error:
        return Listed(source, "", "", False, str(error))
    return Listed(source, facts.architecture, "", True, facts.source)
