"""Masks."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from ..inputs import Choice, Whole
from ..registry import node
from ..run import Run
from .sockets import ImageIn, MaskIn, YesNo

COLOURS = ("red", "green", "blue", "alpha")


@node("MaskToImage", "IMAGE", category="mask")
def to_image(run: Run, mask: MaskIn) -> tuple[Any, ...]:
    """A mask as a grey image."""
    del run
    return (np.repeat(mask[..., None], 3, axis=-1),)


@node("ImageToMask", "MASK", category="mask")
def from_image(run: Run, image: ImageIn, channel: Annotated[str, Choice(COLOURS)] = "red") -> tuple[Any, ...]:
    """A channel of an image; one without alpha is opaque."""
    del run
    number = COLOURS.index(channel)
    if number >= image.shape[-1]:
        return (np.ones(image.shape[:3], np.float32),)
    return (np.ascontiguousarray(image[..., number]),)


@node("InvertMask", "MASK", category="mask")
def invert(run: Run, mask: MaskIn) -> tuple[Any, ...]:
    """The rest of a mask."""
    del run
    return (np.float32(1) - mask,)


@node("GrowMask", "MASK", category="mask")
def grow(
    run: Run, mask: MaskIn, expand: Annotated[int, Whole(-16384, 16384)] = 0, tapered_corners: YesNo = True
) -> tuple[Any, ...]:
    """A mask whose edge moves by so many pixels; tapered corners are those of a diamond."""
    del run
    grown = mask if expand >= 0 else 1 - mask
    for _ in range(min(abs(expand), max(mask.shape))):
        grown = _one_pixel_larger(grown, corners=not tapered_corners)
    return ((grown if expand >= 0 else 1 - grown).astype(np.float32),)


@node("FeatherMask", "MASK", category="mask")
def feather(
    run: Run,
    mask: MaskIn,
    left: Annotated[int, Whole(0, 16384)] = 0,
    top: Annotated[int, Whole(0, 16384)] = 0,
    right: Annotated[int, Whole(0, 16384)] = 0,
    bottom: Annotated[int, Whole(0, 16384)] = 0,
) -> tuple[Any, ...]:
    """A mask that fades towards its sides."""
    del run
    found = mask.copy()
    height, width = mask.shape[1:]
    for count, size, axis, is_end in (
        (left, width, 2, False),
        (right, width, 2, True),
        (top, height, 1, False),
        (bottom, height, 1, True),
    ):
        count = min(count, size)
        ramp = (np.arange(count, dtype=np.float32) + 1) / np.float32(max(count, 1))
        factors = np.ones(size, np.float32)
        if count:
            factors[size - count if is_end else 0 : size if is_end else count] = ramp[::-1] if is_end else ramp
        found *= factors[:, None] if axis == 1 else factors
    return (found,)


def _one_pixel_larger(mask: np.ndarray, *, corners: bool) -> np.ndarray:
    padded = np.pad(mask, [(0, 0), (1, 1), (1, 1)], constant_values=-1)
    height, width = mask.shape[1:]
    places = [(y, x) for y in range(3) for x in range(3) if corners or y == 1 or x == 1]
    return np.max([padded[:, y : y + height, x : x + width] for y, x in places], axis=0)
