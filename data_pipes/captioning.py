"""Captions of raw shards by an image-to-text model: `shapeloom data caption`.

What is written is the captions file that `data build --captions` reads (captions.py). While a run is under way its
lines are in OUT.unfinished, after one that says what the run is, so a run that was killed goes on at its last batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from PIL import Image

from ..errors import UserError
from ..files import canonical_json, write_atomic
from ..progress import Bar
from .caption_twins import words_of
from .captions import JSON_SUFFIXES
from .raw_sample import decode_webp
from .remote_shards import open_shards
from .render import composite
from .shard_folder import ShardFolder
from .survey import strings

__all__ = ["CaptionSettings", "Captioned", "caption", "clean"]

# What is true of every picture of ours, so says nothing of the object: that it is a render, on white.
_PREFIX = re.compile(
    r"^(?:(?:this|here|there|it) is |it's )?(?:(?:an? |the )?"
    r"(?:(?:3[ -]?d|three[ -]dimensional|computer[ -]generated) (?:model|image|picture|illustration|render(?:ing)?)"
    r"|render(?:ing)?|image) of (?=\S))+",
    re.IGNORECASE,
)
_BACKGROUND = re.compile(
    r",? (?:on|with|against|over|in front of) (?:an? |the )?(?:(?:plain|clean|pure|solid) )?white back(?:ground|drop)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CaptionSettings:
    """What the captions depend on, beside the model's weights.

    views: pictures of an asset, a caption each; the first ones, which are frontal. beams, max_tokens, prompt: as of
    ImageToText. batch: pictures at a time. keep: the asset's own captions come first, where they are not made of its
    file's name.
    """

    views: int = 4
    prompt: str | None = None
    beams: int = 3
    max_tokens: int = 40
    batch: int = 16
    keep: bool = False


@dataclass(frozen=True)
class Captioned:
    """What came of it; failed: (file or uid, reason)."""

    out: Path
    assets: int
    captions: int
    from_before: int
    failed: list[tuple[str, str]]

    def __str__(self) -> str:
        before = f", {self.from_before} of them by an earlier run" if self.from_before else ""
        lines = [f"{self.out}: {self.captions} captions of {self.assets} assets{before}"]
        lines += [f"no caption of {name}: {reason}" for name, reason in self.failed[:5]]
        if len(self.failed) > 5:
            lines.append(f"and of {len(self.failed) - 5} more")
        lines.append(f"next: shapeloom data build FOLDER --captions {self.out} --out RAW (renders nothing again)")
        return "\n".join(lines)


class Captioner(Protocol):
    """Gives each picture a text; an ImageToText."""

    def __call__(self, pictures: Sequence[Image.Image], /) -> list[str]: ...


def caption(
    raw: str | Path,
    model: str | Path,
    out: str | Path,
    settings: CaptionSettings | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    allow_download: bool = False,
) -> Captioned:
    """Caption the assets of a folder of raw shards. Run again after an interruption, it goes on where it was.

    Every line has the asset's file, its captions (words that repeat another's are left out) and, where they are
    known, its category, licence, author and source, so that building with the file loses none of them.

    Args:
        model, device, dtype, allow_download: as of ImageToText.
        out: the captions file to write, which must not be there.
    Raises: UserError for raw shards without views or files, a wrong model, an `out` that is there or was begun with
        other settings, or when not one asset could be captioned.
    """
    settings, out = settings or CaptionSettings(), Path(out)
    if out.suffix.lower() not in JSON_SUFFIXES:
        raise UserError(f"--out must end in .jsonl, as data build knows the form by it, got {out}")
    if out.exists():
        raise UserError(f"{out} is there already: give another name, or delete it")
    shards = open_shards(raw)
    if not (shards.has("lit_") or shards.has("view_")):
        raise UserError(f"{shards.folder} has no views to caption: build it with n_views of {settings.views} or more")
    run = {"maker": "data caption", "raw": shards.hash, "model": str(model), **vars(settings)}
    unfinished = out.with_name(out.name + ".unfinished")
    at_once = max(1, settings.batch // settings.views)
    begun = _begun(unfinished, run, out, at_once)
    if begun < len(shards):
        from .image_to_text import ImageToText  # here, since it takes seconds

        captioner = ImageToText(
            model,
            prompt=settings.prompt,
            beams=settings.beams,
            max_tokens=settings.max_tokens,
            device=device,
            dtype=dtype,
            allow_download=allow_download,
        )
        _append(unfinished, run, shards, captioner, settings, begun, at_once)
    return _finish(unfinished, out, begun)


def clean(text: str) -> str:
    """A model's caption without what is surely not of the object: spaces, quotes around it, that it is a render.

    Example: '"A 3D model of a  red chair on a white background."' -> "a red chair".
    """
    said = " ".join("".join(c if c.isprintable() else " " for c in text).split()).strip("\"“”' ")
    short = _BACKGROUND.sub("", _PREFIX.sub("", said.rstrip(". ")))
    return short if words_of(short) else said


# ------------------------------------------------------------------------------------------------- the unfinished file


def _begun(unfinished: Path, run: dict[str, Any], out: Path, at_once: int) -> int:
    """How many assets an earlier run of the same settings did, in whole batches; what follows them is cut off."""
    if not unfinished.is_file():
        return 0
    with open(unfinished, "r+b") as file:
        first = file.readline()
        if not first.endswith(b"\n"):  # killed before anything was done
            file.truncate(0)
            return 0
        if first != _line(run):
            raise UserError(
                f"{unfinished} was begun with another model, other data or other settings: give the same to go on, "
                f"or delete it, or give another --out than {out}"
            )
        ends = [file.tell()]
        ends += [file.tell() for line in iter(file.readline, b"") if line.endswith(b"\n")]
        done = (len(ends) - 1) // at_once * at_once
        file.truncate(ends[done])
    return done


def _append(
    unfinished: Path,
    run: dict[str, Any],
    shards: ShardFolder,
    captioner: Captioner,
    settings: CaptionSettings,
    begun: int,
    at_once: int,
) -> None:
    """Caption the assets from `begun` on; a line of `unfinished` each, those of a batch in one write."""
    failed = 0
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "ab") as file, Bar(len(shards), "captioning", start=begun) as bar:
        if file.tell() == 0:
            _write(file, _line(run))
        for start in range(begun, len(shards), at_once):
            indices = range(start, min(start + at_once, len(shards)))
            rows = _captioned(shards, indices, captioner, settings)
            _write(file, b"".join(map(_line, rows)))
            failed += sum("failed" in row for row in rows)
            bar.update(len(rows), **({"failed": failed} if failed else {}))


def _finish(unfinished: Path, out: Path, begun: int) -> Captioned:
    """The unfinished file as the captions file, without its first line and the assets that failed."""
    rows, failed, captions = [], [], 0
    with open(unfinished, "rb") as file:
        next(file)
        for line in file:
            row = json.loads(line)
            if "failed" in row:
                failed.append((row["file"], row["failed"]))
            else:
                captions += len(row["captions"])
                rows.append(line)
    if not rows:
        unfinished.unlink()
        name, reason = failed[0] if failed else ("", "there are none")
        raise UserError(f"none of the {len(failed)} assets could be captioned, the first, {name}, because {reason}")
    write_atomic(out, b"".join(rows))
    unfinished.unlink()
    return Captioned(out, len(rows), captions, begun, failed)


def _line(row: dict[str, Any]) -> bytes:
    return canonical_json(row).encode() + b"\n"


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()


# ---------------------------------------------------------------------------------------------------------- one batch


def _captioned(
    shards: ShardFolder, indices: Sequence[int], captioner: Captioner, settings: CaptionSettings
) -> list[dict[str, Any]]:
    """A row for each asset; of one that cannot be captioned {"file", "failed"}."""
    rows: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    owners: list[dict[str, Any]] = []  # the row of each picture
    for index in indices:
        row: dict[str, Any] = {"file": shards.uid(index)}
        try:
            row, views = _known(shards, index, settings.keep), _pictures(shards, index, settings.views)
            pictures += views
            owners += [row] * len(views)
        except UserError as error:
            row["failed"] = str(error)
        rows.append(row)
    texts = (text for some in _in_parts(pictures, settings.batch) for text in captioner(some))
    for row, text in zip(owners, texts):
        row["captions"].append(clean(text))
    for row in rows:
        if "failed" not in row:
            row["captions"] = _distinct(row["captions"])
            if not row["captions"]:
                row["failed"] = "the model says nothing of it"
    return rows


def _in_parts(pictures: list[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _known(shards: ShardFolder, index: int, keep: bool) -> dict[str, Any]:
    """The row of a captions file that says what the asset's json does; captions only where they are kept."""
    meta = shards.read_json(index)
    file = meta.get("file")
    if not isinstance(file, str):
        raise UserError("its json names no file, as that of a procedural set: only what data build made is captioned")
    own = strings(meta.get("captions")) if keep and not meta.get("caption_from_name") else []
    said = {name: meta.get(name) for name in ("category", "licence", "author", "source")}
    if said["source"] == file:  # which is what data build writes where none is given
        said["source"] = None
    return {"file": file, "captions": own} | {name: text for name, text in said.items() if isinstance(text, str)}


def _pictures(shards: ShardFolder, index: int, count: int) -> list[Image.Image]:
    """The first views on white, shaded ones where they are stored."""
    members = shards.suffixes(index)
    names = sorted(name for name in members if name.startswith("lit_")) or sorted(
        name for name in members if name.startswith("view_")
    )
    if not names:
        raise UserError("no view of it is stored")
    stored = shards.read(index, names[:count])
    return [Image.fromarray(composite(decode_webp(stored[n], f"{shards.uid(index)}.{n}"))) for n in stored]


def _distinct(captions: list[str]) -> list[str]:
    """Captions with words in them, the first of those that differ in letter case and punctuation alone."""
    first: dict[tuple[str, ...], str] = {}
    for text in captions:
        if words := tuple(words_of(text)):
            first.setdefault(words, text)
    return list(first.values())
