"""Tiled decoding, for sizes whose activations do not fit: overlapping squares, blended by linear ramps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# The part of a tile that its neighbours cover too; diffusers' AutoencoderKL blends a quarter.
OVERLAP = 0.25


def _starts(size: int, tile: int) -> list[int]:
    """The starts of tiles that cover `size` evenly and overlap by a quarter or more."""
    if size <= tile:
        return [0]
    step = max(1, int(tile * (1 - OVERLAP)))
    count = -(-(size - tile) // step) + 1
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(first: int, length: int, size: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels along one axis, rising over the overlap before it and falling over that after it."""
    weight = np.ones(length, np.float32)
    rise = (np.arange(overlap, dtype=np.float32) + 0.5) / overlap
    if first > 0:
        weight[:overlap] = np.minimum(weight[:overlap], rise)
    if first + length < size:
        weight[-overlap:] = np.minimum(weight[-overlap:], rise[::-1])
    return weight


def decode_tiled(
    decode: Callable[[np.ndarray], np.ndarray],
    latents: np.ndarray,
    tile: int,
    factor: int,
    on_tile: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Decode `latents` tile by tile.

    Args:
        decode: converts latents to uint8 images `[batch, height, width, 3]`.
        latents: `[batch, channels, latent_height, latent_width]`.
        tile: pixels of a tile's side.
        factor: pixels per latent.
        on_tile: called with (done, total) before the first tile and after each.

    Returns:
        uint8 images, equal to those of `decode` up to the effect of pixels outside of each tile.
    """
    batch, _, height, width = latents.shape
    side = tile // factor
    overlap = max(1, int(side * OVERLAP)) * factor
    total = np.zeros((batch, height * factor, width * factor, 3), np.float32)
    weights = np.zeros((height * factor, width * factor, 1), np.float32)
    places = [(top, left) for top in _starts(height, side) for left in _starts(width, side)]
    if on_tile is not None:
        on_tile(0, len(places))
    for done, (top, left) in enumerate(places, 1):
        part = np.ascontiguousarray(latents[:, :, top : top + side, left : left + side])
        pixels = decode(part)
        rows, columns = pixels.shape[1:3]
        y, x = top * factor, left * factor
        vertical = _ramp(y, rows, height * factor, min(overlap, rows))
        horizontal = _ramp(x, columns, width * factor, min(overlap, columns))
        weight = (vertical[:, None] * horizontal[None])[..., None]
        total[:, y : y + rows, x : x + columns] += pixels * weight
        weights[y : y + rows, x : x + columns] += weight
        if on_tile is not None:
            on_tile(done, len(places))
    return np.rint(total / weights).astype(np.uint8)
