"""Resizing of latents along arcs: ComfyUI's `bislerp`, which keeps the lengths that a linear mean would shorten.

A latent is a vector of its channels. Along each side, the two neighbours of a place are joined by
spherical interpolation (Shoemake, SIGGRAPH 1985), and the length of the result is the linear mean of theirs.
"""

from __future__ import annotations

import numpy as np

from .resize import check_numbers

BISLERP = "bislerp"
# Cosines from which two directions are the same, or opposite.
SAME = 1 - 1e-5


def bislerp(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """Latents float32 `[batch, channels, rows, columns]` of another size: columns first, then rows."""
    check_numbers("latents", *latents.shape[:2], height, width)
    return _along(_along(latents, width, 3), height, 2)


def _along(latents: np.ndarray, size: int, axis: int) -> np.ndarray:
    before = latents.shape[axis]
    # Places as torch's bilinear interpolation of 0, 1, 2, … has them.
    places = np.clip((np.arange(size) + 0.5) * before / size - 0.5, 0, before - 1).astype(np.float32)
    first = places.astype(int)
    second = np.minimum(first + 1, before - 1)
    shape = [1] * 4
    shape[axis] = size
    share = (places - first).reshape(shape)
    return _slerp(np.take(latents, first, axis), np.take(latents, second, axis), share)


def _slerp(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Vectors along axis 1, a share of the way along the arc from one to the other."""
    lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other)]
    directions = [
        np.divide(each, length, out=np.zeros_like(each), where=length > 0)
        for each, length in zip((one, other), lengths, strict=True)
    ]
    cosine = (directions[0] * directions[1]).sum(axis=1, keepdims=True)
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.where(np.abs(cosine) > SAME, 1, np.sin(angle))
    found = (np.sin((1 - share) * angle) * directions[0] + np.sin(share * angle) * directions[1]) / sine
    found *= lengths[0] * (1 - share) + lengths[1] * share
    found = np.where(cosine > SAME, one, found)
    return np.where(cosine < -SAME, one * (1 - share) + other * share, found).astype(np.float32)
