"""Compiled loops over colours: filtered texture lookups, the colour of surface points, samples averaged into pixels.

All arithmetic is in linear light. A texture's levels halve its size until one texel is left; each texel is the area
average of what it covers, kept as sRGB bytes.
Shapes: M materials, L levels, T texels of all textures and levels, N points of faces, K samples of a picture, P pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, float64, int32, int64, types, uint8, uint32

from .compiled import array, compiled, inlined
from .mesh import srgb_to_linear

__all__ = ["add_samples", "albedo", "finish_pixels", "halve"]

_FAR = 2.0**40  # texture coordinates and footprints beyond it have no fraction left
MOST_PROBES = 8  # lookups along the longer side of a sample's footprint on a texture seen at a slant

_LINEAR = srgb_to_linear(np.arange(256, dtype=np.uint8)).astype(np.float64)
# From linear light to the nearest sRGB byte: byte k begins at _BEGINS[k], and _GUESS is at most a few below the answer.
_BEGINS = np.append(srgb_to_linear((np.arange(256) - 0.5) / 255), np.float32(np.inf))
_BEGINS[0] = -np.inf
_GUESS = np.searchsorted(_BEGINS, np.arange(4097) / np.float32(4096), side="right").astype(np.int32) - 1


@inlined
def _to_byte(linear: float) -> int:
    """The nearest sRGB byte."""
    if not linear > 0:
        return 0
    byte = _GUESS[int(min(linear, 1.0) * 4096)]
    while linear >= _BEGINS[byte + 1]:
        byte += 1
    return byte


@compiled(types.void(array(uint8, 3), array(uint8, 3, written=True)))
def halve(texture_HW4: np.ndarray, smaller_HW4: np.ndarray) -> None:
    """Fill the next level: area averages, rgb in linear light, alpha as it is. Odd sizes share texels by their area."""
    height, width = texture_HW4.shape[0], texture_HW4.shape[1]
    rows, columns = smaller_HW4.shape[0], smaller_HW4.shape[1]
    tall, wide = height / rows, width / columns
    for j in range(rows):
        for i in range(columns):
            r = g = b = a = total = 0.0
            for y in range(int(j * tall), min(int(math.ceil((j + 1) * tall)), height)):
                weight_y = min(y + 1, (j + 1) * tall) - max(y, j * tall)
                for x in range(int(i * wide), min(int(math.ceil((i + 1) * wide)), width)):
                    weight = weight_y * (min(x + 1, (i + 1) * wide) - max(x, i * wide))
                    total += weight
                    r += weight * _LINEAR[texture_HW4[y, x, 0]]
                    g += weight * _LINEAR[texture_HW4[y, x, 1]]
                    b += weight * _LINEAR[texture_HW4[y, x, 2]]
                    a += weight * texture_HW4[y, x, 3]
            smaller_HW4[j, i, 0] = _to_byte(r / total)
            smaller_HW4[j, i, 1] = _to_byte(g / total)
            smaller_HW4[j, i, 2] = _to_byte(b / total)
            smaller_HW4[j, i, 3] = int(a / total + 0.5)


@inlined
def _bilinear(
    texels_T: np.ndarray, start: int, width: int, height: int, u: float, v: float
) -> tuple[float, float, float, float]:
    """Between the four nearest texels of a level, which repeats."""
    x, y = (u - math.floor(u)) * width - 0.5, (v - math.floor(v)) * height - 0.5
    x0, y0 = math.floor(x), math.floor(y)
    fx, fy = x - x0, y - y0
    x1 = 0 if x0 + 1 >= width else x0 + 1
    y1 = 0 if y0 + 1 >= height else y0 + 1
    x0 = x0 + width if x0 < 0 else x0
    y0 = y0 + height if y0 < 0 else y0
    row0, row1 = start + y0 * width, start + y1 * width
    # Unsigned, so that no index is taken to count from the end.
    a, b = texels_T[np.uint64(row0 + x0)], texels_T[np.uint64(row0 + x1)]
    c, d = texels_T[np.uint64(row1 + x0)], texels_T[np.uint64(row1 + x1)]
    if a == b and a == c and a == d:
        return _LINEAR[a & 255], _LINEAR[a >> 8 & 255], _LINEAR[a >> 16 & 255], (a >> 24) / 255
    wa, wb, wc, wd = (1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy
    return (
        wa * _LINEAR[a & 255] + wb * _LINEAR[b & 255] + wc * _LINEAR[c & 255] + wd * _LINEAR[d & 255],
        wa * _LINEAR[a >> 8 & 255]
        + wb * _LINEAR[b >> 8 & 255]
        + wc * _LINEAR[c >> 8 & 255]
        + wd * _LINEAR[d >> 8 & 255],
        wa * _LINEAR[a >> 16 & 255]
        + wb * _LINEAR[b >> 16 & 255]
        + wc * _LINEAR[c >> 16 & 255]
        + wd * _LINEAR[d >> 16 & 255],
        (wa * (a >> 24) + wb * (b >> 24) + wc * (c >> 24) + wd * (d >> 24)) / 255,
    )


@inlined
def _filtered(
    texels_T: np.ndarray,
    levels_ML3: np.ndarray,
    m: int,
    top: int,
    u: float,
    v: float,
    ux: float,
    vx: float,
    uy: float,
    vy: float,
) -> tuple[float, float, float, float]:
    """The texture's average over the parallelogram of (ux, vx) and (uy, vy) around (u, v), all in texture coordinates.

    The level is chosen by the shorter side, and several lookups are spread along the longer one.
    """
    width, height = levels_ML3[m, 0, 1], levels_ML3[m, 0, 2]
    across2, down2 = (ux * width) ** 2 + (vx * height) ** 2, (uy * width) ** 2 + (vy * height) ** 2
    if across2 < down2:
        across2, down2, ux, vx, uy, vy = down2, across2, uy, vy, ux, vx
    if top == 0 or not 1 < across2 < _FAR**2:
        return _bilinear(texels_T, levels_ML3[m, 0, 0], width, height, u, v)
    longer = math.sqrt(across2)
    ratio = min(across2 / max(abs(ux * vy - uy * vx) * width * height, 1e-30), longer, float(MOST_PROBES))
    probes = max(int(ratio + 0.5), 1)
    # The finer of the two levels nearest to the footprint: the coarser, and a mean of both, blur what is no finer than
    # pixels, as neighbours on a palette.
    size, level = longer / min(ratio, probes), 0
    while size >= 2 and level < top:
        size *= 0.5
        level += 1
    start, width, height = levels_ML3[m, level, 0], levels_ML3[m, level, 1], levels_ML3[m, level, 2]
    r = g = b = a = 0.0
    share = 1.0 / probes
    offset = 0.5 * share - 0.5
    for _ in range(probes):
        pr, pg, pb, pa = _bilinear(texels_T, start, width, height, u + offset * ux, v + offset * vx)
        r, g, b, a = r + pr, g + pg, b + pb, a + pa
        offset += share
    return r * share, g * share, b * share, a * share


@inlined
def _corner_mix(corner_F3C: np.ndarray, face: int, c: int, w1: float, w2: float) -> float:
    """A value between the corners of a face; from one corner on, so that what is constant stays so to the last bit."""
    value = float(corner_F3C[face, 0, c])
    return value + w1 * (corner_F3C[face, 1, c] - value) + w2 * (corner_F3C[face, 2, c] - value)


_ARRAYS = (
    array(int32, 1),
    array(float32, 3),
    array(float32, 3),
    array(float32, 2),
    array(float32, 1),
    array(uint32, 1),
    array(int64, 3),
    array(int64, 1),
)


@compiled(array(float32, 2, written=True)(array(int32, 1), array(float32, 2), array(float32, 3), *_ARRAYS))
def albedo(
    face_N: np.ndarray,
    barycentric_N3: np.ndarray,
    sides_N22: np.ndarray,
    face_material: np.ndarray,
    corner_uv: np.ndarray,
    corner_rgba: np.ndarray,
    base_M4: np.ndarray,
    cutoff_M: np.ndarray,
    texels_T: np.ndarray,
    levels_ML3: np.ndarray,
    top_M: np.ndarray,
) -> np.ndarray:
    """[N, 4] colour of points of faces in linear light; see `Mesh.albedo_linear`.

    Args:
        sides_N22: as in `raster.visible`, or empty for no filter.
        corner_uv, corner_rgba: as in `Mesh`, or empty.
        cutoff_M: what alpha is compared with; -inf for opaque materials, NaN where alpha is kept as it is.
        texels_T: uint32, sRGB and alpha as bytes, red lowest.
        levels_ML3: start, width and height of each level of each material's texture; all zero without a texture.
        top_M: the last level of each material.
    """
    rgba_N4 = np.empty((len(face_N), 4), np.float32)
    for n in range(len(face_N)):
        face = face_N[n]
        material = face_material[face]
        w1, w2 = float(barycentric_N3[n, 1]), float(barycentric_N3[n, 2])
        r, g, b, a = float(base_M4[material, 0]), float(base_M4[material, 1]), float(base_M4[material, 2]), 0.0
        a = float(base_M4[material, 3])
        cutoff = cutoff_M[material]
        if len(corner_uv) and levels_ML3[material, 0, 1]:
            u0, v0 = float(corner_uv[face, 0, 0]), float(corner_uv[face, 0, 1])
            u1, v1 = corner_uv[face, 1, 0] - u0, corner_uv[face, 1, 1] - v0
            u2, v2 = corner_uv[face, 2, 0] - u0, corner_uv[face, 2, 1] - v0
            u, v = u0 + w1 * u1 + w2 * u2, v0 + w1 * v1 + w2 * v2
            u, v = u if abs(u) < _FAR else 0.0, v if abs(v) < _FAR else 0.0
            ux = vx = uy = vy = 0.0
            # Cut-outs are told by full texels: the average of a leaf and the air around it is neither.
            if len(sides_N22) and not math.isfinite(cutoff):
                ux = sides_N22[n, 0, 0] * u1 + sides_N22[n, 0, 1] * u2
                vx = sides_N22[n, 0, 0] * v1 + sides_N22[n, 0, 1] * v2
                uy = sides_N22[n, 1, 0] * u1 + sides_N22[n, 1, 1] * u2
                vy = sides_N22[n, 1, 0] * v1 + sides_N22[n, 1, 1] * v2
            tr, tg, tb, ta = _filtered(texels_T, levels_ML3, material, top_M[material], u, v, ux, vx, uy, vy)
            r, g, b, a = r * tr, g * tg, b * tb, a * ta
        if len(corner_rgba):
            r *= _corner_mix(corner_rgba, face, 0, w1, w2)
            g *= _corner_mix(corner_rgba, face, 1, w1, w2)
            b *= _corner_mix(corner_rgba, face, 2, w1, w2)
            a *= _corner_mix(corner_rgba, face, 3, w1, w2)
        if not math.isnan(cutoff):
            a = 1.0 if a >= cutoff else 0.0
        rgba_N4[n, 0], rgba_N4[n, 1] = min(max(r, 0.0), 1.0), min(max(g, 0.0), 1.0)
        rgba_N4[n, 2], rgba_N4[n, 3] = min(max(b, 0.0), 1.0), min(max(a, 0.0), 1.0)
    return rgba_N4


# Columns of the sums over a pixel's samples. Colours are premultiplied by alpha; depth and normal are those of the
# first surface that can be seen, and `covered` counts the samples that have one.
_ALBEDO, _LIT, _SHADE, _ALPHA, _DEPTH, _NORMAL, _COVERED, N_SUMS = 0, 3, 6, 7, 8, 9, 12, 13


@compiled(
    types.void(
        *[array(float32, 2, written=True), array(float32, 1, written=True)],
        *[array(int32, 1), array(int32, 1), array(float32, 1), array(int32, 1), array(int32, 1), array(float32, 2)],
        *[array(float32, 2), array(float32, 3), array(float64, 1), array(float64, 1), array(float64, 1)],
    )
)
def add_samples(
    sums_PC: np.ndarray,
    passing_S: np.ndarray,
    sample_K: np.ndarray,
    spot_K: np.ndarray,
    depth_K: np.ndarray,
    pixel_N: np.ndarray,
    face_N: np.ndarray,
    rgba_N4: np.ndarray,
    normal_F3: np.ndarray,
    triangle_F33: np.ndarray,
    eye_3: np.ndarray,
    light_3: np.ndarray,
    shading_3: np.ndarray,
) -> None:
    """Add what the spots of a view (`raster.visible`) show to their pixels, and dim the light that goes on behind them.

    Args:
        sums_PC: float32 [P, N_SUMS], added to.
        passing_S: float32, the part of each sample's light that was not stopped by nearer surfaces, lowered.
        eye_3, light_3: float64, where the camera is and the direction towards the light.
        shading_3: float64, `render`'s AMBIENT, DIFFUSE and WRAP.
    """
    light_N, first_N = np.zeros(len(face_N), np.float32), np.zeros(len(face_N), np.float32)
    sum_depth_N = np.zeros(len(face_N), np.float32)
    for k in range(len(sample_K)):
        sample, spot = sample_K[k], spot_K[k]
        light_N[spot] += passing_S[sample]
        if passing_S[sample] == 1:
            first_N[spot] += 1
            sum_depth_N[spot] += depth_K[k]
        passing_S[sample] *= 1 - rgba_N4[spot, 3]
    for spot in range(len(face_N)):
        pixel, face, alpha = pixel_N[spot], face_N[spot], rgba_N4[spot, 3] * light_N[spot]
        if alpha == 0:
            continue
        towards_eye = towards_light = 0.0
        for c in range(3):
            towards_eye += normal_F3[face, c] * (eye_3[c] - triangle_F33[face, 0, c])
            towards_light += normal_F3[face, c] * light_3[c]
        turn = 1.0 if towards_eye > 0 else -1.0
        wrapped = max(0.0, (turn * towards_light + shading_3[2]) / (1 + shading_3[2]))
        shade = alpha * (shading_3[0] + shading_3[1] * wrapped)
        for c in range(3):
            sums_PC[pixel, _ALBEDO + c] += rgba_N4[spot, c] * alpha
            sums_PC[pixel, _LIT + c] += rgba_N4[spot, c] * shade
            sums_PC[pixel, _NORMAL + c] += turn * normal_F3[face, c] * first_N[spot]
        sums_PC[pixel, _SHADE] += shade
        sums_PC[pixel, _ALPHA] += alpha
        sums_PC[pixel, _DEPTH] += sum_depth_N[spot]
        sums_PC[pixel, _COVERED] += first_N[spot]


@compiled(
    types.void(
        array(float32, 2, written=True),
        array(int32, 1),
        float64,
        float64,
        *[array(uint8, 2, written=True)] * 3,
        array(float32, 1, written=True),
        array(float32, 2, written=True),
    )
)
def finish_pixels(
    sums_PC: np.ndarray,
    pixel_N: np.ndarray,
    n_samples: float,
    grey: float,
    albedo_P4: np.ndarray,
    lit_P4: np.ndarray,
    textureless_P4: np.ndarray,
    depth_P: np.ndarray,
    normal_P3: np.ndarray,
) -> None:
    """Fill one view of `render.Views`, where anything is seen, from the sums over its samples, which become zero.

    Args:
        pixel_N: where anything may be seen, some perhaps several times.
        grey: the albedo of textureless pictures.
    """
    to_alpha = 255 / n_samples
    for pixel in pixel_N:
        alpha = int(sums_PC[pixel, _ALPHA] * to_alpha + 0.5)
        if alpha == 0:
            sums_PC[pixel] = 0
            continue
        scale = 1 / float(sums_PC[pixel, _ALPHA])
        grey_byte = _to_byte(sums_PC[pixel, _SHADE] * scale * grey)
        length2 = 0.0
        for c in range(3):
            albedo_P4[pixel, c] = _to_byte(sums_PC[pixel, _ALBEDO + c] * scale)
            lit_P4[pixel, c] = _to_byte(sums_PC[pixel, _LIT + c] * scale)
            textureless_P4[pixel, c] = grey_byte
            length2 += float(sums_PC[pixel, _NORMAL + c]) ** 2
        albedo_P4[pixel, 3] = lit_P4[pixel, 3] = textureless_P4[pixel, 3] = alpha
        depth_P[pixel] = sums_PC[pixel, _DEPTH] / sums_PC[pixel, _COVERED]
        if length2 > 1e-12:
            scale = 1 / math.sqrt(length2)
            for c in range(3):
                normal_P3[pixel, c] = sums_PC[pixel, _NORMAL + c] * scale
        sums_PC[pixel] = 0
