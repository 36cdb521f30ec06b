"""Picture files from outside."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from ..errors import UserError

__all__ = ["open_picture"]

MOST_PIXELS = 1 << 26


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as RGB on white, turned as its EXIF says.

    Raises: UserError naming the file, if it is missing, no picture, damaged, or so large that it looks like an attack.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image {path} does not exist or is not a file")
    try:
        with Image.open(path) as probe:
            pixels = probe.width * probe.height
            probe.verify()
        if pixels > MOST_PIXELS:
            raise Image.DecompressionBombError
        with Image.open(path) as image:
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except Image.DecompressionBombError:
        raise UserError(f"image {path} has too many pixels; make it smaller, 1024 x 1024 is plenty") from None
    except (OSError, ValueError, SyntaxError, EOFError):
        raise UserError(
            f"image {path} is not a picture that can be read; give a whole PNG, JPEG or WebP file"
        ) from None
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")
