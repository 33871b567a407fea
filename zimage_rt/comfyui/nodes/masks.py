"""Masks."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Choice, Socket, Whole
from ..registry import node
from ..resize import check_numbers, resize, to_8_bits
from ..run import Made, Run
from .dynamic import MAX_BATCHES, filled, growing_node
from .latents import centre
from .sockets import MAX_SIZE, ImageIn, MaskIn, Pixels, Share, YesNo

# Pixels that a mask grows by until it is said how far it is, and may be cancelled.
TELL_STEPS = 64
COLOURS = ("red", "green", "blue", "alpha")
OPERATIONS = ("multiply", "add", "subtract", "and", "or", "xor")
MaybeMask = Annotated[np.ndarray | None, Socket("MASK")]
Side = Annotated[int, Whole(1, MAX_SIZE)]


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
    grown = mask if expand >= 0 else 1 - mask
    count = min(abs(expand), max(mask.shape))
    for step in range(count):
        if step and step % TELL_STEPS == 0:
            run.tell(step, count)
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


@node("SolidMask", "MASK", category="mask")
def solid(run: Run, value: Share = 1.0, width: Side = 512, height: Side = 512) -> tuple[Any, ...]:
    """A mask of one value."""
    del run
    check_numbers("size", height, width)
    return (np.full((1, height, width), value, np.float32),)


@node("CropMask", "MASK", category="mask")
def crop(
    run: Run, mask: MaskIn, x: Pixels = 0, y: Pixels = 0, width: Side = 512, height: Side = 512
) -> tuple[Any, ...]:
    """A part of a mask, cut off at its sides."""
    del run
    if x >= mask.shape[2] or y >= mask.shape[1]:
        raise WorkflowError(f"x and y: expected a place in {mask.shape[2]} by {mask.shape[1]} pixels, got {x}, {y}")
    return (np.ascontiguousarray(mask[:, y : y + height, x : x + width]),)


@node("MaskComposite", "MASK", category="mask")
def combine(
    run: Run,
    destination: MaskIn,
    source: MaskIn,
    x: Pixels = 0,
    y: Pixels = 0,
    operation: Annotated[str, Choice(OPERATIONS)] = "multiply",
) -> tuple[Any, ...]:
    """A mask with another put on it; the operations of logic take values from a half on as yes."""
    del run
    found = destination.copy()
    window = found[:, y : y + source.shape[1], x : x + source.shape[2]]
    if len(source) not in (1, len(destination)):
        raise WorkflowError(f"source: expected 1 or {len(destination)} masks, got {len(source)}")
    part = source[:, : window.shape[1], : window.shape[2]]
    if operation in ("and", "or", "xor"):
        logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[operation]
        window[:] = logic(np.rint(window), np.rint(part))
    else:
        window[:] = {"multiply": np.multiply, "add": np.add, "subtract": np.subtract}[operation](window, part)
    return (np.clip(found, 0, 1),)


@node("ThresholdMask", "MASK", category="mask")
def threshold(run: Run, mask: MaskIn, value: Share = 0.5) -> tuple[Any, ...]:
    """A hard mask: 1 above a value."""
    del run
    return ((mask > np.float32(value)).astype(np.float32),)


@node("ImageColorToMask", "MASK", category="mask")
def of_colour(run: Run, image: ImageIn, color: Annotated[int, Whole(0, 0xFFFFFF)] = 0) -> tuple[Any, ...]:
    """A mask of the pixels that are 0xRRGGBB."""
    del run
    wanted = [color >> 16, color >> 8 & 255, color & 255]
    pixels = np.rint(np.clip(image[..., :3], 0, 1) * np.float32(255))
    return ((pixels == wanted).all(axis=-1).astype(np.float32),)


@growing_node("BatchMasksNode", "MASK", category="mask", names=[f"mask{at}" for at in range(MAX_BATCHES)])
def batch_masks(run: Run, **masks: MaskIn) -> tuple[Any, ...]:
    """Masks as one batch; each gets the first one's size."""
    del run
    first, *others = filled(masks).values()
    height, width = first.shape[1:]
    check_numbers("masks", sum(len(each) for each in (first, *others)), height, width)
    parts = [first]
    for mask in others:
        vertical, horizontal = centre(mask.shape[1], mask.shape[2], height, width)
        parts.append(resize(mask[:, vertical, horizontal], height, width, "bilinear"))
    return (np.concatenate(parts),)


@node("MaskPreview", "MASK", category="mask", is_output=True)
def preview(run: Run, mask: MaskIn) -> tuple[Any, ...]:
    """Show a mask as grey images."""
    grey = to_8_bits(np.repeat(mask[..., None], 3, axis=-1))
    run.shown += [Made(run.node, image, "preview", True) for image in grey]
    return (mask,)


def _one_pixel_larger(mask: np.ndarray, *, corners: bool) -> np.ndarray:
    padded = np.pad(mask, [(0, 0), (1, 1), (1, 1)], constant_values=-1)
    height, width = mask.shape[1:]
    places = [(y, x) for y in range(3) for x in range(3) if corners or y == 1 or x == 1]
    return np.max([padded[:, y : y + height, x : x + width] for y, x in places], axis=0)
