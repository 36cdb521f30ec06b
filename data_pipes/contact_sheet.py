"""Contact sheets: pictures in a grid with a caption under each, and a look into a folder of raw shards."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..files import write_atomic
from .loader import order
from .raw_sample import decode_npz, decode_webp
from .remote_shards import is_remote, open_shards
from .render import composite
from .shard_folder import ShardFolder

INK, PAPER, LINE = (34, 34, 40), (255, 255, 255), (226, 226, 231)
MAX_LINES = 4
SHEET = "contact_sheet.png"
LOOKED_AT = 5000  # json members read for the summary; more are thinned evenly


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int, tile: int, title: str | None = None
) -> Image.Image:
    """Pictures in rows of `columns`, each scaled to fit `tile` x `tile` pixels, captions wrapped below.

    Args:
        images: uint8 [H, W, 3] each, of any size.
        captions: as many as images; "" for none, at most four lines are shown.
    Raises: ValueError if there is no picture or captions do not match.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"a contact sheet needs as many captions as pictures, got {len(captions)} and {len(images)}")
    columns = min(columns, len(images))
    font = _font(max(11, round(tile / 12)))
    line_height = round(font.size * 1.3)
    wrapped = [_wrap(caption, font, tile) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    text_heights = [line_height * max(len(wrapped[i]) for i in row) for row in rows]
    gap = max(6, tile // 16)
    title_font = _font(round(font.size * 1.35))
    title_lines = _wrap(title or "", title_font, columns * (tile + gap) - gap)
    title_height = len(title_lines) * round(title_font.size * 1.35)
    top = gap + (title_height + gap if title_height else 0)
    height = top + sum(tile + text + 2 * gap for text in text_heights)
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, line in enumerate(title_lines):
        draw.text((gap, gap + k * round(title_font.size * 1.35)), line, INK, title_font)
    y = top
    for row, text_height in zip(rows, text_heights):
        for column, i in enumerate(row):
            x = gap + column * (tile + gap)
            picture = _fit(images[i], tile)
            sheet.paste(picture, (x + (tile - picture.width) // 2, y + (tile - picture.height) // 2))
            draw.rectangle((x, y, x + tile - 1, y + tile - 1), outline=LINE)
            for k, line in enumerate(wrapped[i]):
                left = x + (tile - font.getlength(line)) / 2
                draw.text((left, y + tile + gap // 2 + k * line_height), line, INK, font)
        y += tile + text_height + 2 * gap
    return sheet


def write_png(path: str | Path, image: Image.Image) -> None:
    """Write a picture as PNG, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The TrueType font that Pillow brings along."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def _fit(image_HW3: np.ndarray, tile: int) -> Image.Image:
    picture = Image.fromarray(np.asarray(image_HW3, np.uint8))
    scale = tile / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word too long is cut, and so is what exceeds `MAX_LINES`."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, font, width))
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], _cut(lines[MAX_LINES - 1] + "…", font, width, always=True)]
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int, always: bool = False) -> str:
    """`text`, or as much of it as fits before an ellipsis."""
    if font.getlength(text) <= width:
        return text
    text = text.rstrip("…") if always else text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@dataclass(frozen=True)
class RawSummary:
    """What a folder of raw shards holds."""

    folder: str
    samples: int
    shards: int
    bytes: int
    splits: dict[str, int]
    categories: dict[str, int]  # of the samples looked at, the commonest first
    looked_at: int
    captions_per_sample: float
    points: dict[str, int]  # surface, field
    views: int
    image_size: tuple[int, int] | None
    shown: int
    picture: Path | None

    def __str__(self) -> str:
        commonest = ", ".join(f"{name} {n}" for name, n in list(self.categories.items())[:8])
        more = f", and {len(self.categories) - 8} more" if len(self.categories) > 8 else ""
        looked = "" if self.looked_at == self.samples else f" (of {self.looked_at} looked at)"
        size = f" of {self.image_size[0]} x {self.image_size[1]}" if self.image_size else ""
        points = ", ".join(f"{n} {name}" for name, n in self.points.items()) or "none"
        lines = [
            f"{self.folder}: {self.samples} samples in {self.shards} shard(s), {self.bytes / 1e6:.1f} MB",
            f"  splits      {', '.join(f'{name} {n}' for name, n in self.splits.items())}",
            f"  categories  {commonest or 'none'}{more}{looked}",
            f"  captions    {self.captions_per_sample:.1f} per sample",
            f"  points      {points}",
            f"  views       {self.views}{size}",
            f"  picture     {f'{self.picture}, {self.shown} samples' if self.picture else 'no views are stored'}",
        ]
        return "\n".join(lines)


def sheet_of_raw(
    folder: str | Path, out_png: str | Path | None = None, n: int = 24, split: str | None = None
) -> RawSummary:
    """Write a contact sheet of `n` samples of a split (or all), always the same ones, and say what the folder holds.

    Args:
        out_png: contact_sheet.png in `folder` by default, of a URL in the working folder.
    Raises: UserError if the folder is no finished folder of raw shards or has no such split.
    """
    if out_png is not None and Path(out_png).suffix.lower() != ".png":
        raise UserError(f"the contact sheet must be named .png, got {out_png}")
    shards = open_shards(folder)
    chosen = shards.select(split)
    picks = [chosen[i] for i in sorted(order(len(chosen), 0, np.arange(min(n, len(chosen)))))]
    members = shards.suffixes(picks[0]) if picks else []
    views = [name for name in members if name.startswith("view_")]
    front = next((name for name in ("lit_00.webp", "view_00.webp") if name in members), None)
    picture, size = None, None
    if front:
        images = [decode_webp(shards.read(i, [front])[front], f"{shards.uids[i]}.{front}") for i in picks]
        size = (images[0].shape[1], images[0].shape[0])
        captions = [(shards.read_json(i)["captions"] or [shards.uids[i]])[0] for i in picks]
        title = f"{shards.title}{f' / {split}' if split else ''}: {len(picks)} of {len(chosen)}"
        tile = max(128, min(192, size[0]))
        sheet = contact_sheet([composite(image) for image in images], captions, columns=8, tile=tile, title=title)
        picture = Path(out_png or (SHEET if is_remote(folder) else Path(folder) / SHEET))
        write_png(picture, sheet)
    looked = range(0, len(shards), max(1, len(shards) // LOOKED_AT))
    metas = [shards.read_json(i) for i in looked]
    return RawSummary(
        folder=str(shards.folder),
        samples=len(shards),
        shards=len(shards.manifest["shards"]),
        bytes=sum(shard["bytes"] for shard in shards.manifest["shards"]),
        splits=dict(Counter(shards.splits(i) for i in range(len(shards)))),
        categories=dict(Counter(meta["category"] or "none" for meta in metas).most_common()),
        looked_at=len(metas),
        captions_per_sample=sum(len(meta["captions"]) for meta in metas) / max(1, len(metas)),
        points=_points(shards, picks[0]) if picks else {},
        views=len(views),
        image_size=size,
        shown=len(picks),
        picture=picture,
    )


def _points(shards: ShardFolder, index: int) -> dict[str, int]:
    """Number of stored points of one sample, by kind."""
    kinds = [kind for kind in ("surface", "field") if f"{kind}.npz" in shards.suffixes(index)]
    stored = {kind: shards.read(index, [f"{kind}.npz"])[f"{kind}.npz"] for kind in kinds}
    return {kind: len(decode_npz(data, f"{shards.uids[index]}.{kind}.npz")["xyz"]) for kind, data in stored.items()}
