"""Conversion of input images to eight bits per channel by the range of their format; unknown ranges are refused.

diffusers' VaeImageProcessor divides any PIL image by 255, and ComfyUI clips or wraps values of more than eight bits.
Both make a 16-bit depth map white, so neither is followed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

# Tags of TIFF: bits per sample; photometric interpretation, 0 if 0 is white; sample format, 1 if unsigned.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_UNSIGNED = 1


def from_array(array: np.ndarray, name: str) -> Image:
    """Convert an array `[height, width]` or `[height, width, 1, 3 or 4]` to an image of eight bits per channel.

    The range is 0 to 255 for uint8, 0 to 65535 for uint16, 0 to 1 for floats, as in diffusers, and black and white for
    bool. Raises RequestError for any other type or shape, and for floats that are not finite or outside 0 to 1.
    """
    from PIL import Image

    kind = array.dtype
    known = kind in (np.uint8, np.uint16, np.bool_) or (kind.kind == "f" and kind.itemsize in (2, 4, 8))
    if not known or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise RequestError(
            f"{name}: expected uint8, uint16, bool, or floats from 0 to 1, [height, width], or with 1, 3 or 4 "
            f"channels behind, got {kind} {list(array.shape)}"
        )
    if kind == np.uint16:
        array = _scale_to_8_bits(array, 65535)
    elif kind == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif kind != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also for NaN
            raise RequestError(
                f"{name}: expected floats from 0 to 1, got {low:g} to {high:g}; give uint8 for 0 to 255, or "
                "(array + 1) / 2 for -1 to 1"
            )
        array = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
    array = np.ascontiguousarray(array)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def to_8_bits(image: Image, name: str) -> Image:
    """Convert an image of any of Pillow's modes to `L`, `LA`, `RGB` or `RGBA`; transparency is preserved.

    Raises RequestError for modes without a known range: `F`, and `I` that is not from a file of 16 bits.
    """
    from PIL import Image

    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _from_16_bits(image, name)
    if mode == "F":
        raise RequestError(
            f"{name}: expected an image with a known range, got mode F, floats of any range; give an array of floats "
            "from 0 to 1, or uint8"
        )
    if mode in ("La", "RGBa"):  # premultiplied alpha
        return image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    transparent = "transparency" in image.info
    if mode == "1" or mode == "L":
        return image.convert("RGBA") if transparent else image.convert("L")
    if mode in ("P", "PA", "RGB"):
        # A palette may have alpha, in its entries or in `transparency`.
        opaque = mode == "RGB" or (mode == "P" and image.getpalette("RGB") is not None and not _alpha_in_palette(image))
        if opaque and not transparent:
            return image if mode == "RGB" else image.convert("RGB")
        return image.convert("RGBA")
    if mode in ("LA", "RGBA"):
        return image
    try:
        return image.convert("RGB")  # CMYK, YCbCr, LAB, HSV, RGBX
    except (ValueError, ImportError, Image.DecompressionBombError) as error:
        raise RequestError(f"{name}: mode {mode} cannot be read ({error}); give it as RGB") from error


def _alpha_in_palette(image: Image) -> bool:
    return image.palette is not None and "A" in image.palette.mode


def _scale_to_8_bits(values: np.ndarray, white: int) -> np.ndarray:
    """Scale values from 0 to `white` to uint8 from 0 to 255, rounded to nearest."""
    scaled = values.astype(np.float32) * np.float32(255 / white)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _from_16_bits(image: Image, name: str) -> Image:
    """Convert modes I;16… and I; `transparency` is the grey value of transparent pixels."""
    from PIL import Image

    white, inverted = _white_level(image, name)
    values = np.asarray(image).astype(np.int32)
    grey = _scale_to_8_bits(white - values if inverted else values, white)
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        return Image.fromarray(np.stack([grey, np.where(values == see_through, 0, 255).astype(np.uint8)], axis=-1))
    return Image.fromarray(grey)


def _white_level(image: Image, name: str) -> tuple[int, bool]:
    """The largest value, which is white, and whether the image is inverted: 0 is white."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits, sign = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
        if tuple(sign) != (_UNSIGNED,) or len(bits) != 1 or not 8 < bits[0] <= 16:
            raise RequestError(
                f"{name}: expected a TIFF of at most 16 bits without a sign, got {list(bits)} bits in mode "
                f"{image.mode}; save it with 8 or 16 bits"
            )
        return (1 << bits[0]) - 1, tags.get(_PHOTOMETRIC) == 0
    if image.mode == "I" and image.format != "PNG":
        raise RequestError(
            f"{name}: expected an image with a known range, got mode I, whole numbers of any range; give uint16 for "
            "0 to 65535, or uint8, as an array"
        )
    return 65535, False
