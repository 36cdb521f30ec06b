"""Members of a raw sample: how surface, field, views and the rest become bytes, and back.

N points, V views of H x W:

    json            uid, captions, category, source, licence, author, sha256, transform, split, and whatever is added
    surface.npz     xyz f16 [N, 3], normal i8 [N, 3] (x 127), rgb u8 [N, 3] sRGB
    field.npz       xyz f16 [N, 3], sdf f16 [N] (negative inside, object units), rgb u8 [N, 3]
    view_00.webp    albedo of view 0, RGBA, straight alpha, lossless; lit_00.webp the same, lit
    depth.npz       depth u16 [V, H, W], scale f32: z-depth = depth * scale in object units, 0 where nothing is seen
    cameras.json    `Cameras.to_json`
"""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from ..files import canonical_json

if TYPE_CHECKING:
    from ..models.cameras import Cameras
    from .render import Views
    from .sampling import Field, Surface

NORMAL_SCALE = 127.0

# What NumPy and zipfile raise for bytes that were changed: RuntimeError where the bit says "encrypted", MemoryError
# where a shape became huge, the tokenizer's own error where a header is no longer a Python literal.
ARRAY_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    EOFError,
    OSError,
    KeyError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    RuntimeError,
    MemoryError,
)


def encode_npz(*, compressed: bool = False, **arrays: np.ndarray) -> bytes:
    """Arrays as npz bytes; NumPy stamps the members 1980, so equal arrays give equal bytes."""
    buffer = io.BytesIO()
    save: Any = np.savez_compressed if compressed else np.savez
    save(buffer, **arrays)
    return buffer.getvalue()


def decode_npz(data: bytes, what: str) -> dict[str, np.ndarray]:
    """Arrays of an npz. Raises UserError naming `what` where a byte was changed (CRC) or cut."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except ARRAY_ERRORS as error:
        raise UserError(f"{what} is damaged ({error}): delete its shard and build it again") from None


def decode_json(data: bytes, what: str) -> dict[str, Any]:
    """Raises UserError naming `what` where it is no JSON object."""
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise UserError(f"{what} is damaged ({error}): delete its shard and build it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{what} must be a JSON object, got {type(fields).__name__}")
    return fields


def encode_webp(rgba_HW4: np.ndarray) -> bytes:
    """u8 [H, W, 4] as lossless WebP, exact also where alpha is 0.

    Least effort: 0.1 ms at 64 x 64, against 1 ms for files a quarter smaller.
    """
    buffer = io.BytesIO()
    Image.fromarray(rgba_HW4).save(buffer, "WEBP", lossless=True, exact=True, quality=25, method=0)
    return buffer.getvalue()


def decode_webp(data: bytes, what: str) -> np.ndarray:
    """u8 [H, W, 4]. Raises UserError naming `what` where it is no image."""
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            return np.array(image.convert("RGBA"))
    except UnidentifiedImageError:  # its text has an address in memory, another each time
        raise UserError(f"{what} is not a WebP image: delete its shard and build it again") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{what} is not a WebP image ({error}): delete its shard and build it again") from None


def encode_raw_sample(
    uid: str,
    *,
    captions: list[str],
    category: str | None,
    source: str | None,
    licence: str | None,
    author: str | None,
    sha256: str | None,
    transform: np.ndarray | None,
    split: str,
    surface: Surface | None = None,
    field: Field | None = None,
    views: Views | None = None,
    cameras: Cameras | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Members of one raw sample, suffix -> bytes (see the head of this file).

    Args:
        transform: [4, 4], normalised object frame to the source's units.
        cameras: of the views; needed with them.
        extra: more keys for the json.
    """
    meta = {
        "uid": uid,
        "captions": captions,
        "category": category,
        "source": source,
        "licence": licence,
        "author": author,
        "sha256": sha256,
        "transform": None if transform is None else np.asarray(transform, float).tolist(),
        "split": split,
        **(extra or {}),
    }
    members = {"json": canonical_json(meta).encode()}
    if surface is not None:
        normal = np.rint(surface.normal * NORMAL_SCALE).astype(np.int8)
        members["surface.npz"] = encode_npz(xyz=surface.xyz.astype(np.float16), normal=normal, rgb=surface.rgb)
    if field is not None:
        members["field.npz"] = encode_npz(
            xyz=field.xyz.astype(np.float16), sdf=field.sdf.astype(np.float16), rgb=field.rgb
        )
    if views is not None:
        assert cameras is not None, "views without cameras cannot be used"
        for name, images in (("view", views.albedo), ("lit", views.lit)):
            members |= {f"{name}_{v:02d}.webp": encode_webp(image) for v, image in enumerate(images)}
        members["depth.npz"] = _encode_depth(views.depth)
        members["cameras.json"] = canonical_json(cameras.to_json()).encode()
    return members


def decode_surface(data: bytes, what: str) -> dict[str, np.ndarray]:
    """xyz f16, normal i8 (x 127), rgb u8, as stored."""
    return _with_fields(decode_npz(data, what), ("xyz", "normal", "rgb"), what)


def decode_field(data: bytes, what: str) -> dict[str, np.ndarray]:
    """xyz f16, sdf f16, rgb u8, as stored."""
    return _with_fields(decode_npz(data, what), ("xyz", "sdf", "rgb"), what)


def decode_depth(data: bytes, what: str) -> np.ndarray:
    """z-depth f32 [V, H, W] in object units, inf where nothing is seen."""
    stored = _with_fields(decode_npz(data, what), ("depth", "scale"), what)
    depth = stored["depth"].astype(np.float32) * stored["scale"]
    return np.where(stored["depth"] == 0, np.float32(np.inf), depth)


def _encode_depth(depth_VHW: np.ndarray) -> bytes:
    seen = np.isfinite(depth_VHW)
    scale = np.float32(max(depth_VHW[seen].max(initial=0.0), 1e-6) / 65535)
    steps = np.zeros(depth_VHW.shape, np.uint16)
    steps[seen] = np.clip(np.rint(depth_VHW[seen] / scale), 1, 65535)
    return encode_npz(compressed=True, depth=steps, scale=scale)


def _with_fields(arrays: dict[str, np.ndarray], names: tuple[str, ...], what: str) -> dict[str, np.ndarray]:
    if missing := set(names) - arrays.keys():
        raise UserError(f"{what} lacks the array '{min(missing)}': it was not written by this format")
    return arrays
