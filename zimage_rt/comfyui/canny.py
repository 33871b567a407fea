"""Canny's edge detection with the numbers of kornia 0.9.0, which ComfyUI calls.

Along straight edges many pixels are equally strong, and the last bit of a sum decides which of them is the edge. So
sums are made in float32, in the order in which torch makes them on a CPU. Its square root there is not always rounded
correctly; this one is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Luma of ITU-R BT.601.
RED, GREEN, BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)
# Keeps the square root of a flat place away from 0.
EPSILON = 1e-6
# The neighbour along a gradient, (dy, dx), by its direction in steps of 45 degrees from +x to +y.
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
# Directions in which a neighbour may be as large: of two equal pixels the left or upper one is the edge.
TIES = (0, 2)


def canny(images: np.ndarray, low: float, high: float) -> np.ndarray:
    """Find edges.

    Args:
        images: float32 `[batch, height, width, 3]` from 0 to 1; each side has 3 or more pixels.
        low, high: thresholds of the Sobel gradient, which reaches about 2.6: an edge begins above `high` and goes on
            while it is above `low`.

    Returns:
        float32 `[batch, height, width]`, 1 at edges.
    """
    return np.stack([_canny(image, low, high) for image in images])


def _canny(image: np.ndarray, low: float, high: float) -> np.ndarray:
    across, down = _sobel(_blurred(_grey(image)))
    height, width = across.shape
    # One pixel more on each side, without a gradient.
    across_padded, down_padded = np.pad(across, 1), np.pad(down, 1)
    padded = np.sqrt(across_padded * across_padded + down_padded * down_padded + np.float32(EPSILON))
    magnitude = padded[1:-1, 1:-1]
    # Half to even, as torch rounds.
    direction = np.rint(np.arctan2(down, across) * np.float32(4 / np.pi)).astype(int) % 8
    neighbours = np.stack([padded[1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in DIRECTIONS])
    is_edge = magnitude > padded[0, 0]
    for way in (direction, (direction + 4) % 8):
        neighbour = np.take_along_axis(neighbours, way[None], axis=0)[0]
        is_edge &= (magnitude > neighbour) | (np.isin(way, TIES) & (magnitude == neighbour))
    return _connected(is_edge & (magnitude > np.float32(high)), is_edge & (magnitude > np.float32(low)))


def _grey(image: np.ndarray) -> np.ndarray:
    """The luma `[height, width]`."""
    return _weighted((image[..., channel] for channel in range(3)), (RED, GREEN, BLUE))


def _blurred(grey: np.ndarray) -> np.ndarray:
    """A Gaussian of 5 by 5 with a deviation of 1; the borders are reflected."""
    weights = np.exp(-(np.arange(-2, 3, dtype=np.float32) ** 2) / 2)
    weights /= weights.sum()
    height, width = grey.shape
    padded = np.pad(grey, 2, mode="reflect")
    rows = _weighted((padded[:, at : at + width] for at in range(5)), weights)
    return _weighted((rows[at : at + height] for at in range(5)), weights)


def _weighted(arrays: Iterable[np.ndarray], weights: Sequence[np.float32] | np.ndarray) -> np.ndarray:
    """float32, the sum of products, each added with one rounding: a fused multiply-add."""
    total: Any = np.float32(0)
    for array, weight in zip(arrays, weights, strict=True):
        total = (array * np.float64(weight) + total).astype(np.float32)
    return np.asarray(total)


def _sobel(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient to the right and down; the borders are repeated."""
    height, width = grey.shape
    padded = np.pad(grey, 1, mode="edge")
    part = {(y, x): padded[1 + y : 1 + y + height, 1 + x : 1 + x + width] for y in (-1, 0, 1) for x in (-1, 0, 1)}
    across = [x * (2 - abs(y)) * part[y, x] for y, x in part if x]
    down = [y * (2 - abs(x)) * part[y, x] for y, x in part if y]
    return functools.reduce(np.add, across), functools.reduce(np.add, down)


def _connected(strong: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """float32, 1 at strong pixels and at the weak ones that a chain of weak neighbours leads to."""
    found = np.pad(strong, 1)
    open_weak = np.pad(weak & ~strong, 1)
    line = found.shape[1]
    steps = np.array([y * line + x for y, x in DIRECTIONS])
    # Only the newest pixels are followed, so that a long chain costs its own length.
    flat, waiting = found.reshape(-1), open_weak.reshape(-1)
    newest = np.flatnonzero(flat)
    while newest.size:
        near = np.unique(newest[:, None] + steps)
        newest = near[waiting[near]]
        flat[newest], waiting[newest] = True, False
    return found[1:-1, 1:-1].astype(np.float32)
