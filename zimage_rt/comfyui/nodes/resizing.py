"""The node that resizes images and masks in several ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Choice, Number, Spec, Whole
from ..registry import ANY, Input, node
from ..run import Run
from .compose import sized
from .dynamic import AnyIn, AnyValue, Branch, add_inputs, filled
from .sockets import MAX_SIZE, Method

# The ways, and the inputs that each has.
RESIZES: Mapping[str, tuple[str, ...]] = {
    "scale dimensions": ("width", "height", "crop"),
    "scale by multiplier": ("multiplier",),
    "scale longer dimension": ("longer_size",),
    "scale shorter dimension": ("shorter_size",),
    "scale width": ("width",),
    "scale height": ("height",),
    "scale total pixels": ("megapixels", "multiple"),
    "match size": ("match", "crop"),
    "scale to multiple": ("multiple",),
}


@node("ResizeImageMaskNode", ANY, category="image/transform")
def resize_image_or_mask(
    run: Run,
    input: Annotated[np.ndarray, AnyValue()],
    resize_type: Annotated[str, Branch(tuple(RESIZES), parts=RESIZES)],
    scale_method: Method = "area",
    **parts: AnyIn,
) -> tuple[Any, ...]:
    """An image or a mask of another size."""
    del run
    if not isinstance(input, np.ndarray) or input.ndim not in (3, 4):
        raise WorkflowError(f"input: expected an image or a mask, got a {type(input).__name__}")
    given = filled(parts)
    missing = [name for name in RESIZES[resize_type] if name not in given]
    if missing:
        raise WorkflowError(f"resize_type.{missing[0]}: expected a value for {resize_type!r}, got nothing")
    pixels = input if input.ndim == 4 else input[..., None]
    resized = _resized(pixels, resize_type, scale_method, given)
    return (resized if input.ndim == 4 else resized[..., 0],)


_side = Whole(0, MAX_SIZE, default=512)
# The inputs of RESIZES.
PARTS: Mapping[str, Spec] = {
    "width": _side,
    "height": _side,
    "crop": Choice(("disabled", "center"), default="center"),
    "multiplier": Number(0.01, 8.0, default=1.0),
    "longer_size": _side,
    "shorter_size": _side,
    "megapixels": Number(0.01, 16.0, default=1.0),
    "multiple": Whole(1, MAX_SIZE, default=1),
    "match": AnyValue(),
}
add_inputs("ResizeImageMaskNode", {f"resize_type.{name}": Input(spec, None) for name, spec in PARTS.items()})


def _resized(pixels: np.ndarray, way: str, method: str, given: Mapping[str, Any]) -> np.ndarray:
    """Images or masks `[batch, height, width, channels]` of the size that one of RESIZES gives."""
    rows, columns = pixels.shape[1:3]
    crop = given["crop"] if "crop" in RESIZES[way] else "disabled"
    if way == "match size":
        match = given["match"]
        if not isinstance(match, np.ndarray) or match.ndim not in (3, 4):
            raise WorkflowError(f"resize_type.match: expected an image or a mask, got a {type(match).__name__}")
        return sized(pixels, 1, match.shape[1], match.shape[2], method, crop)
    if way == "scale to multiple":
        return _covering(pixels, given["multiple"], method)
    sizes: Mapping[str, Callable[[], tuple[float, float]]] = {
        "scale dimensions": lambda: _dimensions(rows, columns, given["height"], given["width"]),
        "scale by multiplier": lambda: (rows * given["multiplier"], columns * given["multiplier"]),
        "scale longer dimension": lambda: _scaled_side(rows, columns, given["longer_size"], max(rows, columns)),
        "scale shorter dimension": lambda: _scaled_side(rows, columns, given["shorter_size"], min(rows, columns)),
        "scale width": lambda: _dimensions(rows, columns, 0, given["width"]),
        "scale height": lambda: _dimensions(rows, columns, given["height"], 0),
        "scale total pixels": lambda: _megapixels(rows, columns, given["megapixels"], given["multiple"]),
    }
    height, width = (round(side) for side in sizes[way]())
    if not height or not width:
        raise WorkflowError(f"resize_type: expected a size of a pixel or more, got {width} by {height}")
    return sized(pixels, 1, height, width, method, crop)


def _dimensions(rows: int, columns: int, height: int, width: int) -> tuple[float, float]:
    """A size of which one side may be 0, so that it keeps the aspect ratio."""
    if not height and not width:
        return rows, columns
    return height or max(1, round(rows * width / columns)), width or max(1, round(columns * height / rows))


def _scaled_side(rows: int, columns: int, size: int, side: int) -> tuple[float, float]:
    """A size whose side that is `side` now is `size` then."""
    return (size if rows == side else rows / columns * size), (size if columns == side else columns / rows * size)


def _megapixels(rows: int, columns: int, megapixels: float, multiple: int) -> tuple[float, float]:
    factor = math.sqrt(int(megapixels * 1024 * 1024) / (rows * columns))
    return max(1, round(rows * factor / multiple)) * multiple, max(1, round(columns * factor / multiple)) * multiple


def _covering(pixels: np.ndarray, multiple: int, method: str) -> np.ndarray:
    """Images scaled to cover the largest multiples that are in their size, and cut off to them."""
    rows, columns = pixels.shape[1:3]
    height, width = rows // multiple * multiple, columns // multiple * multiple
    if not height or not width or (height, width) == (rows, columns):
        return pixels
    if width / columns >= height / rows:
        size = (max(height, math.ceil(rows * (width / columns))), width)
    else:
        size = (height, max(width, math.ceil(columns * (height / rows))))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return sized(pixels, 1, size[0], size[1], method, "disabled")[:, top : top + height, left : left + width]
