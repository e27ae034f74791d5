"""Pillow's affine transforms that only shift rows or columns (translation, shear), at a fraction of their cost.

Pillow weighs every pixel's neighbours by itself. Here a row has one shift, so one set of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["quickly", "transform"]


def quickly(function: Callable[..., Image.Image], image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    """`function(image, ...)`, where that asks for nothing but `image.size` and one `image.transform`."""
    return function(_Shiftable(image), *args, **kwargs)


class _Shiftable:
    def __init__(self, image: Image.Image) -> None:
        self.image, self.size = image, image.size

    def transform(self, *args: Any, **kwargs: Any) -> Image.Image:
        return transform(self.image, *args, **kwargs)


def transform(
    image: Image.Image,
    size: tuple[int, int],
    method: Image.Transform,
    data: Sequence[float],
    resample: int = Image.Resampling.NEAREST,
    fillcolor: Any = None,
) -> Image.Image:
    """`image.transform(...)`. Pixels differ from Pillow's by one level at most, for the rounding."""
    a, b, c, d, e, f = data
    shears = image.mode == "RGB" and size == image.size and method == Image.Transform.AFFINE and (a, e) == (1, 1)
    known = resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    if not (shears and known and ((d, f) == (0, 0) or (b, c) == (0, 0))):
        return image.transform(size, method, data, resample, fillcolor=fillcolor)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(size[::-1])
    fill = np.array([*(fillcolor or (0, 0, 0)), 0], np.uint8).view(np.uint32)[0]
    if (d, f) == (0, 0):
        shifted = _shift_rows(pixels, b * (np.arange(size[1]) + 0.5) + c, resample, fill)
    else:
        shifted = _shift_rows(pixels.T, d * (np.arange(size[0]) + 0.5) + f, resample, fill).T
    return Image.frombytes("RGB", size, np.ascontiguousarray(shifted).tobytes(), "raw", "RGBX")


def _shift_rows(pixels: np.ndarray, shifts: np.ndarray, resample: int, fill: np.uint32) -> np.ndarray:
    """Row y of the answer is row y of `pixels` (H, W), four bytes each, read `shifts[y]` further right."""
    height, width = pixels.shape
    whole = np.floor(shifts).astype(np.int64)
    part = (shifts - whole).astype(np.float32)[:, None, None]
    margin = int(min(np.abs(whole).max(), width)) + 3
    whole = whole.clip(3 - margin, margin - 3)  # further away there is only filling
    padded = np.empty((height, width + 2 * margin), np.uint32)
    padded[:, margin:-margin] = pixels
    padded[:, :margin] = pixels[:, :1]
    padded[:, -margin:] = pixels[:, -1:]
    if (whole == whole[0]).all():
        start = margin + int(whole[0])

        def tap(at: int) -> np.ndarray:
            return padded[:, start + at : start + at + width]

    else:
        flat = padded.reshape(-1)
        places = (np.arange(height) * padded.shape[1] + margin + whole)[:, None] + np.arange(width)

        def tap(at: int) -> np.ndarray:
            return flat.take(places + at if at else places)

    def levels(at: int, kind: type) -> np.ndarray:
        return np.ascontiguousarray(tap(at)).view(np.uint8).reshape(height, width, 4).astype(kind)

    if resample == Image.Resampling.BILINEAR:
        weight = np.rint(part * 256).astype(np.uint16)
        mixed = levels(0, np.uint16)
        mixed *= 256 - weight
        mixed += levels(1, np.uint16) * weight
        mixed >>= 8
    else:  # Pillow's bicubic kernel in two dimensions, where a is -1
        weights = (
            -part + 2 * part**2 - part**3,
            1 - 2 * part**2 + part**3,
            part + part**2 - part**3,
            part**3 - part**2,
        )
        mixed = levels(-1, np.float32) * weights[0]
        for at in (0, 1, 2):
            tapped = levels(at, np.float32)
            tapped *= weights[at + 1]
            mixed += tapped
        np.clip(mixed, 0, 255, out=mixed)
    shifted = mixed.astype(np.uint8).view(np.uint32)[..., 0]
    centres = np.arange(width) + 0.5 + shifts[:, None]
    shifted[(centres < 0) | (centres >= width)] = fill
    return shifted
