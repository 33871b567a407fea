"""Resizing as ComfyUI does it: torch's interpolation without antialiasing, and Pillow's Lanczos for images.

Formulas are those of torch.nn.functional.interpolate with align_corners=False.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Weights of a size: float64 `[size, before]`, whose rows sum to 1.
Weights = Callable[[int, int], np.ndarray]


def _nearest(before: int, size: int) -> np.ndarray:
    weights = np.zeros((size, before))
    weights[np.arange(size), np.minimum(((np.arange(size) + 0.5) * before / size).astype(int), before - 1)] = 1
    return weights


def _bilinear(before: int, size: int) -> np.ndarray:
    places = np.maximum((np.arange(size) + 0.5) * before / size - 0.5, 0)
    first = np.minimum(places.astype(int), before - 1)
    share = places - first
    weights = np.zeros((size, before))
    np.add.at(weights, (np.arange(size), first), 1 - share)
    np.add.at(weights, (np.arange(size), np.minimum(first + 1, before - 1)), share)
    return weights


def _bicubic(before: int, size: int) -> np.ndarray:
    places = (np.arange(size) + 0.5) * before / size - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((size, before))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(places - first - offset)
        a = -0.75  # torch's
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        np.add.at(
            weights,
            (np.arange(size), np.clip(first + offset, 0, before - 1)),
            np.where(distance <= 1, near, far),
        )
    return weights


def _area(before: int, size: int) -> np.ndarray:
    weights = np.zeros((size, before))
    for row in range(size):
        first, end = row * before // size, -(-(row + 1) * before // size)
        weights[row, first:end] = 1 / (end - first)
    return weights


METHODS: dict[str, Weights] = {
    "nearest-exact": _nearest,
    "bilinear": _bilinear,
    "area": _area,
    "bicubic": _bicubic,
}


def resize(array: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    """Resize the last two axes of a float32 array by a method of METHODS."""
    rows, columns = (METHODS[method](*sizes) for sizes in ((array.shape[-2], height), (array.shape[-1], width)))
    return np.ascontiguousarray(np.einsum("ya,...ab,xb->...yx", rows, array, columns, optimize=True), np.float32)


def resize_images(images: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    """Resize images float32 `[batch, height, width, channels]`; `lanczos` is Pillow's, in 8 bits."""
    if method != "lanczos":
        planes = np.moveaxis(images, -1, 1)
        return np.ascontiguousarray(np.moveaxis(resize(planes, height, width, method), 1, -1))
    from PIL import Image

    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS), np.float32)
        for image in to_8_bits(images)
    ]
    return np.stack(resized) / np.float32(255)


def to_8_bits(images: np.ndarray) -> np.ndarray:
    """uint8 of float images: cut off, not rounded. What was 8 bits before stays the same."""
    # A value of n / 255 times 255 may be just less than n in float32.
    return np.clip(255 * images + np.float32(1e-3), 0, 255).astype(np.uint8)
