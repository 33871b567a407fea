"""An image computed in tiles that overlap and fade into one another, by ComfyUI's rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

# Sides of a tile and of what two of them share, in pixels of the input; tiles are halved when memory does not suffice.
TILE, OVERLAP, LEAST_TILE = 512, 32, 128

# float32 `[1, 3, height, width]` → `[1, 3, height * scale, width * scale]`.
Upscale = Callable[[np.ndarray], np.ndarray]


def upscale_in_tiles(image: np.ndarray, upscale: Upscale, scale: int, tile: int) -> np.ndarray:
    """Enlarge an image, float32 `[1, 3, height, width]`, in tiles of at most that size."""
    height, width = image.shape[2:]
    if max(height, width) <= tile:
        return upscale(image)
    total = np.zeros((1, 3, height * scale, width * scale), np.float32)
    weights = np.zeros(total.shape[2:], np.float32)
    for top, left in itertools.product(_positions(height, tile), _positions(width, tile)):
        found = upscale(np.ascontiguousarray(image[:, :, top : top + tile, left : left + tile]))
        rows, columns = found.shape[2:]
        faded = _fade(rows, OVERLAP * scale)[:, None] * _fade(columns, OVERLAP * scale)
        place = np.s_[top * scale : top * scale + rows, left * scale : left * scale + columns]
        total[:, :, *place] += found * faded
        weights[place] += faded
    total /= weights
    return total


def count_tiles(height: int, width: int, tile: int) -> int:
    """The number of tiles of an image."""
    return 1 if max(height, width) <= tile else len(_positions(height, tile)) * len(_positions(width, tile))


def _positions(size: int, tile: int) -> list[int]:
    """The first pixels of the tiles along a side; one if it fits."""
    return list(range(0, size - OVERLAP, tile - OVERLAP)) if size > tile else [0]


def _fade(size: int, edge: int) -> np.ndarray:
    """The weights along a tile's side: they rise at both ends, also at those of the image, where nothing else is."""
    found = np.ones(size, np.float32)
    if edge < size:
        ramp = (np.arange(edge, dtype=np.float32) + 1) / np.float32(edge)
        found[:edge] *= ramp
        found[size - edge :] *= ramp[::-1]
    return found
