"""Contact sheets: labelled pictures on a grid; with pairs and ticks, which `data_pipes.contact_sheet` has not."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Cell", "contact_sheet"]

INK, QUIET, RIGHT, WRONG = "#1f2430", "#7a8194", "#1f9d61", "#d2453d"
FONT_SIZE, LINE, PAD = 12, 15, 8


@dataclass(frozen=True)
class Cell:
    """One entry of a sheet: pictures side by side, a caption below, a tick or a cross (or neither)."""

    images: Sequence[np.ndarray]  # u8 [H, W, 3] each
    caption: str = ""
    right: bool | None = None


def contact_sheet(cells: Sequence[Cell], *, columns: int, size: int = 96, title: str = "") -> Image.Image:
    """Lay the cells out row by row.

    Args:
        columns: cells per row.
        size: pixels of each picture's side on the sheet.
        title: one line above everything.
    Raises: ValueError without a cell.
    """
    if not cells:
        raise ValueError("a contact sheet needs at least one picture")
    font = ImageFont.load_default(FONT_SIZE)
    columns = min(columns, len(cells))
    width = max(len(cell.images) for cell in cells) * size
    captions = [_wrap(cell.caption, font, width - (18 if cell.right is not None else 0)) for cell in cells]
    height = size + LINE * max(len(lines) for lines in captions) + PAD
    rows = -(-len(cells) // columns)
    top = PAD + (LINE + PAD if title else 0)
    sheet = Image.new("RGB", (PAD + columns * (width + PAD), top + rows * (height + PAD)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((PAD, PAD), title, fill=QUIET, font=font)
    for index, (cell, lines) in enumerate(zip(cells, captions, strict=True)):
        x, y = PAD + index % columns * (width + PAD), top + index // columns * (height + PAD)
        for place, image in enumerate(cell.images):
            picture = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + place * size, y))
        draw.rectangle((x, y, x + width - 1, y + size - 1), outline="#e3e6ee")
        for number, line in enumerate(lines):
            draw.text((x, y + size + 2 + number * LINE), line, fill=INK, font=font)
        if cell.right is not None:
            _mark(draw, x + width - 14, y + size + 3, cell.right)
    return sheet


def _wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most three lines that fit the width in pixels."""
    per_character = max(font.getlength("a caption of mean width") / 23, 1)
    return textwrap.wrap(caption, max(8, int(width / per_character)), max_lines=3, placeholder=" …")


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross of 12 x 12 pixels, drawn because the built-in font has neither."""
    if right:
        draw.line([(x, y + 6), (x + 4, y + 10), (x + 11, y + 1)], fill=RIGHT, width=2)
    else:
        draw.line([(x + 1, y + 1), (x + 11, y + 11)], fill=WRONG, width=2)
        draw.line([(x + 11, y + 1), (x + 1, y + 11)], fill=WRONG, width=2)
