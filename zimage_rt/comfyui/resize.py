"""Resizing as ComfyUI does it: torch's interpolation without antialiasing, and Pillow's Lanczos for images.

Formulas are those of torch.nn.functional.interpolate with align_corners=False. Arrays of more than `MAX_NUMBERS`
numbers are refused before they are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .graph import WorkflowError

# Numbers in one image, mask or latent: a gibibyte in float32, or an image of 9400 by 9400 pixels.
MAX_NUMBERS = 1 << 28

# Rows of an image that are converted at once.
ROWS = 64

# What each place of a size is made of: the indices before, and their weights, whose rows sum to 1; both `[size, taps]`.
Taps = tuple[np.ndarray, np.ndarray]
TapsOf = Callable[[int, int], Taps]


def check_numbers(name: str, *shape: int) -> None:
    """Raise WorkflowError if an array of that shape would have more than `MAX_NUMBERS` numbers."""
    if math.prod(shape) > MAX_NUMBERS:
        got = " x ".join(str(size) for size in shape)
        raise WorkflowError(f"{name}: expected at most {MAX_NUMBERS} numbers, got {got}; take a smaller size or batch")


def _nearest(before: int, size: int) -> Taps:
    places = np.minimum(((np.arange(size) + 0.5) * before / size).astype(int), before - 1)
    return places[:, None], np.ones((size, 1))


def _bilinear(before: int, size: int) -> Taps:
    places = np.maximum((np.arange(size) + 0.5) * before / size - 0.5, 0)
    first = np.minimum(places.astype(int), before - 1)
    share = places - first
    return np.stack([first, np.minimum(first + 1, before - 1)], axis=1), np.stack([1 - share, share], axis=1)


def _bicubic(before: int, size: int) -> Taps:
    places = (np.arange(size) + 0.5) * before / size - 0.5
    first = np.floor(places).astype(int)[:, None]
    indices = first + np.arange(-1, 3)
    distance = np.abs(places[:, None] - indices)
    a = -0.75  # torch's
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.clip(indices, 0, before - 1), np.where(distance <= 1, near, far)


def _area(before: int, size: int) -> Taps:
    rows = np.arange(size)
    first, end = rows * before // size, -(-(rows + 1) * before // size)
    indices = first[:, None] + np.arange((end - first).max())
    weights = np.where(indices < end[:, None], 1 / (end - first)[:, None], 0)
    return np.minimum(indices, before - 1), weights


METHODS: dict[str, TapsOf] = {
    "nearest-exact": _nearest,
    "bilinear": _bilinear,
    "area": _area,
    "bicubic": _bicubic,
}


def resize(array: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    """Resize the last two axes of a float32 array by a method of METHODS. Raises WorkflowError; see `check_numbers`."""
    check_numbers("size", *array.shape[:-2], height, width)
    sizes = {-2: (array.shape[-2], height), -1: (array.shape[-1], width)}
    # The axis that shrinks more comes first, so that nothing between is larger than both ends.
    for axis in sorted(sizes, key=lambda axis: sizes[axis][1] / sizes[axis][0]):
        array = _resized(array, axis, *METHODS[method](*sizes[axis]))
    return np.ascontiguousarray(array, np.float32)


def _resized(array: np.ndarray, axis: int, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64, each place of an axis the weighted sum of its taps."""
    shape = (-1, 1) if axis == -2 else (-1,)
    total: Any = 0
    for tap in range(indices.shape[1]):
        total = total + array.take(indices[:, tap], axis) * weights[:, tap].reshape(shape)
    return np.asarray(total)


def resize_images(images: np.ndarray, height: int, width: int, method: str) -> np.ndarray:
    """Resize images float32 `[batch, height, width, channels]`; `lanczos` is Pillow's, in 8 bits."""
    if method != "lanczos":
        planes = np.moveaxis(images, -1, 1)
        return np.ascontiguousarray(np.moveaxis(resize(planes, height, width, method), 1, -1))
    from PIL import Image

    check_numbers("size", len(images), height, width, images.shape[-1])
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS), np.float32)
        for image in to_8_bits(images)
    ]
    return np.stack(resized) / np.float32(255)


def to_8_bits(image: np.ndarray) -> np.ndarray:
    """uint8 of a float image `[height, width, channels]`: cut off, not rounded. What was 8 bits before stays so."""
    found = np.empty(image.shape, np.uint8)
    for first in range(0, len(image), ROWS):  # a few rows at a time stay in the processor's cache
        scaled = image[first : first + ROWS] * np.float32(255)
        scaled += np.float32(1e-3)  # a value of n / 255 times 255 may be just less than n in float32
        np.clip(scaled, 0, 255, out=scaled)
        np.copyto(found[first : first + ROWS], scaled, casting="unsafe")
    return found
