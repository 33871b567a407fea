"""Images cut, padded, rotated, put together, and drawn over each other."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Choice, Whole
from ..registry import node
from ..resize import check_numbers, resize, resize_images
from ..run import Run
from ..values import repeated
from .dynamic import MAX_BATCHES, filled, growing_node
from .images import MaybeImage
from .latents import centre
from .masks import MaybeMask
from .sockets import MAX_SIZE, Batch, ImageIn, Pixels, YesNo

Side = Annotated[int, Whole(1, MAX_SIZE)]
COLOURS = {"white": (1, 1, 1), "black": (0, 0, 0), "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
ROTATIONS = ("none", "90 degrees", "180 degrees", "270 degrees")
FLIPS = ("x-axis: vertically", "y-axis: horizontally")


@node("EmptyImage", "IMAGE", category="image")
def empty(
    run: Run,
    width: Side = 512,
    height: Side = 512,
    batch_size: Batch = 1,
    color: Annotated[int, Whole(0, 0xFFFFFF)] = 0,
) -> tuple[Any, ...]:
    """Images of one colour: 0xRRGGBB."""
    del run
    check_numbers("size", batch_size, height, width, 3)
    colour = np.array([color >> 16, color >> 8 & 255, color & 255], np.float64) / 255
    return (np.full((batch_size, height, width, 3), colour, np.float32),)


@node("ImageCrop", "IMAGE", category="image/transform")
def crop(
    run: Run, image: ImageIn, width: Side = 512, height: Side = 512, x: Pixels = 0, y: Pixels = 0
) -> tuple[Any, ...]:
    """A part of an image, cut off at its sides."""
    del run
    x, y = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
    return (np.ascontiguousarray(image[:, y : y + height, x : x + width]),)


@node("ImagePadForOutpaint", "IMAGE", "MASK", category="image")
def pad_for_outpaint(
    run: Run,
    image: ImageIn,
    left: Pixels = 0,
    top: Pixels = 0,
    right: Pixels = 0,
    bottom: Pixels = 0,
    feathering: Pixels = 40,
) -> tuple[Any, ...]:
    """An image with grey borders, and a mask of them that fades into the image."""
    del run
    batch, rows, columns, channels = image.shape
    check_numbers("size", batch, rows + top + bottom, columns + left + right, channels)
    sides = ((top, bottom), (left, right))
    padded = np.pad(image, ((0, 0), *sides, (0, 0)), constant_values=0.5)
    fade = np.zeros((rows, columns), np.float32)
    if 0 < feathering * 2 < min(rows, columns):
        down, across = (
            _distance(size, before, after) for size, (before, after) in zip((rows, columns), sides, strict=True)
        )
        near = np.minimum(down[:, None], across)
        fade = (np.maximum(feathering - near, 0) / feathering).astype(np.float64) ** 2
    mask = np.pad(fade.astype(np.float32), sides, constant_values=1)
    return padded, mask[None]


@node("ImageFromBatch", "IMAGE", category="image/batch")
def from_batch(
    run: Run, image: ImageIn, batch_index: Annotated[int, Whole(-MAX_SIZE, MAX_SIZE)] = 0, length: Batch = 1
) -> tuple[Any, ...]:
    """Some images of a batch; a negative place counts from its end."""
    del run
    count = len(image)
    first = max(0, min(batch_index + count if batch_index < 0 else batch_index, count - 1))
    return (image[first : first + length],)


@node("RepeatImageBatch", "IMAGE", category="image/batch")
def repeat(run: Run, image: ImageIn, amount: Batch = 1) -> tuple[Any, ...]:
    """A batch several times over."""
    del run
    check_numbers("amount", amount, *image.shape)
    return (np.tile(image, (amount, 1, 1, 1)),)


@growing_node("BatchImagesNode", "IMAGE", category="image/batch", names=[f"image{at}" for at in range(MAX_BATCHES)])
def batch_images(run: Run, **images: ImageIn) -> tuple[Any, ...]:
    """Batches as one; each gets the first one's size."""
    del run
    first, *others = filled(images).values()
    height, width = first.shape[1:3]
    check_numbers("images", sum(len(each) for each in (first, *others)), *first.shape[1:])
    return (np.concatenate([first, *(sized(each, 1, height, width, "bilinear") for each in others)]),)


@node("ImageFlip", "IMAGE", category="image/transform")
def flip(run: Run, image: ImageIn, flip_method: Annotated[str, Choice(FLIPS)]) -> tuple[Any, ...]:
    """An image upside down or mirrored."""
    del run
    return (np.ascontiguousarray(np.flip(image, 1 + FLIPS.index(flip_method))),)


@node("ImageRotate", "IMAGE", category="image/transform")
def rotate(run: Run, image: ImageIn, rotation: Annotated[str, Choice(ROTATIONS)]) -> tuple[Any, ...]:
    """An image rotated clockwise."""
    del run
    return (np.ascontiguousarray(np.rot90(image, ROTATIONS.index(rotation), (2, 1))),)


@node("ImageStitch", "IMAGE", category="image/transform")
def stitch(
    run: Run,
    image1: ImageIn,
    direction: Annotated[str, Choice(("right", "down", "left", "up"))] = "right",
    match_image_size: YesNo = True,
    spacing_width: Annotated[int, Whole(0, 1024)] = 0,
    spacing_color: Annotated[str, Choice(tuple(COLOURS))] = "white",
    image2: MaybeImage = None,
) -> tuple[Any, ...]:
    """Two images beside each other; the second gets the first one's height or width, or the smaller one is padded."""
    del run
    if image2 is None:
        return (image1,)
    along = 2 if direction in ("left", "right") else 1
    across = 3 - along
    count = max(len(image1), len(image2))
    if match_image_size:
        ratio = image2.shape[2] / image2.shape[1]
        height, width = image1.shape[1:3]
        size = (height, int(height * ratio)) if along == 2 else (int(width / ratio), width)
        image2 = resize_images(image2, max(1, size[0]), max(1, size[1]), "lanczos")
    largest = max(image1.shape[across], image2.shape[across])
    spacing = spacing_width + spacing_width % 2
    check_numbers("size", count, largest, image1.shape[along] + spacing + image2.shape[along], 3)
    # Padding is black where the spacing is coloured, as in ComfyUI.
    grey = float(spacing_color == "white")
    parts = [_padded(_last_repeated(each, count), across, largest, grey) for each in (image1, image2)]
    if direction in ("left", "up"):
        parts.reverse()
    shape = list(parts[0].shape)
    shape[along] = spacing
    parts.insert(1, np.broadcast_to(np.array(COLOURS[spacing_color], np.float32), shape))
    return (np.concatenate(parts, along),)


@node("ResizeAndPadImage", "IMAGE", category="image/transform")
def resize_and_pad(
    run: Run,
    image: ImageIn,
    target_width: Side = 512,
    target_height: Side = 512,
    padding_color: Annotated[str, Choice(("white", "black"))] = "white",
    interpolation: Annotated[str, Choice(("area", "bicubic", "nearest-exact", "bilinear", "lanczos"))] = "area",
) -> tuple[Any, ...]:
    """An image that fits into a size, with borders."""
    del run
    batch, rows, columns, channels = image.shape
    check_numbers("size", batch, target_height, target_width, channels)
    factor = min(target_width / columns, target_height / rows)
    height, width = int(rows * factor), int(columns * factor)
    if not height or not width:
        raise WorkflowError(f"target size: expected one pixel of the image or more, got {width} by {height}")
    padded = np.full((batch, target_height, target_width, channels), float(padding_color == "white"), np.float32)
    top, left = (target_height - height) // 2, (target_width - width) // 2
    padded[:, top : top + height, left : left + width] = resize_images(image, height, width, interpolation)
    return (padded,)


@node("ImageCompositeMasked", "IMAGE", category="image")
def composite_masked(
    run: Run,
    destination: ImageIn,
    source: ImageIn,
    x: Pixels = 0,
    y: Pixels = 0,
    resize_source: YesNo = False,
    mask: MaybeMask = None,
) -> tuple[Any, ...]:
    """An image drawn over another, where the mask is 1."""
    del run
    planes = composite(np.moveaxis(destination, -1, 1), np.moveaxis(source, -1, 1), (y, x), mask, resize_source)
    return (np.ascontiguousarray(np.moveaxis(planes, 1, -1)),)


def composite(
    destination: np.ndarray, source: np.ndarray, corner: tuple[int, int], mask: np.ndarray | None, is_resized: bool
) -> np.ndarray:
    """Draw planes over others.

    Args:
        destination: `[batch, channels, height, width]`.
        source: planes of any size and batch; what lies outside is cut off.
        corner: the row and column of the source's own.
        mask: `[batch, height, width]` of any size, 1 for the source; None is 1 everywhere.
        is_resized: whether the source gets the destination's size first.

    Returns:
        float32 planes like the destination.
    """
    if is_resized:
        source = resize(source, destination.shape[2], destination.shape[3], "bilinear")
    check_numbers("source", len(destination), *source.shape[1:])
    source = repeated(source, len(destination))
    top, left = (min(place, size) for place, size in zip(corner, destination.shape[2:], strict=True))
    window = (..., slice(top, top + source.shape[2]), slice(left, left + source.shape[3]))
    under = destination[window]
    seen = (..., slice(under.shape[2]), slice(under.shape[3]))
    share: Any = np.float32(1)
    if mask is not None:
        share = repeated(resize(mask[:, None], source.shape[2], source.shape[3], "bilinear"), len(source))[seen]
    found = destination.copy()
    found[window] = share * source[seen] + (np.float32(1) - share) * under
    return found


def sized(array: np.ndarray, axis: int, height: int, width: int, method: str, crop: str = "center") -> np.ndarray:
    """Images or planes of another size.

    Args:
        array: float32.
        axis: the axis of the rows, 1 of images and 2 of planes; columns come after it.
        height, width: the new size.
        method: see `resize_images`; of planes one of METHODS.
        crop: `center` cuts to the new aspect ratio first.
    """
    rows, columns = array.shape[axis : axis + 2]
    if (rows, columns) == (height, width):
        return array
    if crop == "center":
        vertical, horizontal = centre(rows, columns, height, width)
        array = array[(slice(None),) * axis + (vertical, horizontal)]
    if axis == 2:
        return resize(array, height, width, method)
    if method == "lanczos" and array.shape[3] == 1:  # Pillow has no image of three axes with one channel
        return resize_images(np.repeat(array, 3, axis=3), height, width, method)[..., :1]
    return resize_images(array, height, width, method)


def _distance(size: int, before: int, after: int) -> np.ndarray:
    """The distance of each place to the nearer end that has a border; `size` if none has."""
    places = np.arange(size)
    return np.minimum(places if before else size, size - places if after else size) + np.zeros(size, int)


def _last_repeated(images: np.ndarray, count: int) -> np.ndarray:
    return images[np.minimum(np.arange(count), len(images) - 1)]


def _padded(images: np.ndarray, axis: int, size: int, value: float) -> np.ndarray:
    missing = size - images.shape[axis]
    widths = [(0, 0)] * images.ndim
    widths[axis] = (missing // 2, missing - missing // 2)
    return np.pad(images, widths, constant_values=value) if missing else images
