"""Conversion between images and arrays: decoder outputs, input images and masks."""

from __future__ import annotations

import math
import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks, limits
from .._core import paste as core_paste
from ..errors import OutOfMemory, RequestError
from .modes import from_array, to_8_bits

if TYPE_CHECKING:
    from PIL.Image import Image

# Fitting an image of another aspect ratio: crop it, pad it with black, or stretch it.
FITS = ("crop", "pad", "stretch")
# Pillow's names of the formats of input files. Its other formats are old, rare, or run another program.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
# The tag of EXIF's orientation, and Pillow's transposition that undoes each. Pillow's own `exif_transpose` does not
# support 16-bit modes.
ORIENTATION = 0x0112
TRANSPOSES = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert decoder output `[batch, 3, height, width]` in [-1, 1] to uint8 `[batch, height, width, 3]`.

    Rounds to nearest, as diffusers' VaeImageProcessor does.
    """
    scaled = np.clip(images * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1))


def read_image(value: Any, name: str, notes: list[str] | None = None) -> Image:
    """Read an image as mode L, LA, RGB or RGBA, upright by its EXIF orientation.

    Args:
        value: a `PIL.Image` of any mode with a known range, a path to a file of `FORMATS`, or an array for
            `modes.from_array`.
        name: the request's field.
        notes: gets a sentence if the file has more frames or pages than the first, which alone is used.

    Raises:
        RequestError: it is none of these, is too large or damaged, or cannot be read.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        _check_size(value.shape[:2][::-1], name)
        return from_array(value, name)
    if isinstance(value, Image.Image):
        return _decode(value, name, name)
    if not isinstance(value, (str, os.PathLike)):
        raise RequestError(f"{name}: expected a PIL image, an array or a path, got {type(value).__name__}")
    path = checks.path(value, name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise OSError("it is no file")
        image = _open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name}: {path}: expected at most {limits.MAX_INPUT_PIXELS} pixels: {error}") from error
    except FileNotFoundError as error:
        raise RequestError(f"{name}: {path} cannot be read as an image: there is no such file") from error
    except Exception as error:  # Pillow has no error class for damaged files
        reason = getattr(error, "strerror", None) or error  # the text of an OSError repeats the path
        raise RequestError(
            f"{name}: {path} cannot be read as an image: {reason}; expected an undamaged file of {', '.join(FORMATS)}"
        ) from error
    with image:
        _check_size(image.size, name)
        read = _decode(image, name, f"{name}: {path}")
        # Further images of a JPEG (MPO) are parts of the first, such as its depth or the other eye's view.
        if notes is not None and image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append(f"{name}: {path.name} has several frames or pages; the first one is used")
        return read


def _open(path: Path) -> Image:
    """Open a file and read its header; pixels are decoded after the size check. All checksums of a PNG are compared."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=FORMATS)
        if image.format == "PNG":
            with image:
                image.verify()  # not done by decoding; the image cannot be used afterwards
            image = Image.open(path, formats=FORMATS)
    return image


def _check_size(size: tuple[int, ...], name: str) -> None:
    if math.prod(size) > limits.MAX_INPUT_PIXELS:
        raise RequestError(
            f"{name}: expected at most {limits.MAX_INPUT_PIXELS} pixels, got {'x'.join(map(str, size))}; scale it down"
        )


def _decode(image: Image, name: str, what: str) -> Image:
    """Decode the first frame, or a caller's image, to eight bits per channel, upright by its EXIF orientation."""
    from PIL import Image

    try:
        _check_size(image.size, name)
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1)
        eight = to_8_bits(image, name)
    except RequestError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{what}: its {image.width}x{image.height} pixels do not fit; scale it down") from error
    except Exception as error:  # cut off, damaged, or closed: Pillow has no error class for these
        raise RequestError(f"{what} cannot be read as an image: {error}; it is damaged, cut off or closed") from error
    if 0 in eight.size:
        raise RequestError(f"{name}: expected an image with pixels, got {eight.width}x{eight.height}")
    transposition = TRANSPOSES.get(orientation)
    return eight if transposition is None else eight.transpose(Image.Transpose[transposition])


def flatten(image: Image, background: str = "white") -> Image:
    """Convert an image to RGB; transparent pixels are blended with the background."""
    from PIL import Image

    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_image(image: Image, width: int, height: int, fit: str) -> Image:
    """Fit an image to width x height by one of `FITS`; `pad` adds black, which in a mask marks pixels to preserve."""
    from PIL import Image, ImageOps

    if image.size == (width, height):
        return image
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def read_mask(
    image: Image, image_size: tuple[int, int], width: int, height: int, fit: str, feather: float
) -> np.ndarray:
    """The mask as uint8 `[height, width]`: 255 to draw, 0 to preserve.

    A mask matches its image after EXIF orientation. At another size it is scaled to the image's, then fitted as the
    image is, so that they stay aligned.

    The mask is thresholded at middle grey, as in diffusers; feathering blurs its edge with a Gaussian of radius
    `feather`.

    Args:
        image: the mask, from `read_image`.
        image_size: width and height of its image before fitting.
        width, height: the size that image and mask are fitted to.
        fit: one of `FITS`.
        feather: pixels.

    Raises:
        RequestError: its aspect ratio is not that of its image.
    """
    from PIL import Image, ImageFilter

    if image.size != image_size:
        if not _same_shape(image.size, image_size):
            raise RequestError(
                f"mask: expected the shape of its image, {image_size[0]}x{image_size[1]} (width x height), at any "
                f"size, got {image.width}x{image.height}; draw it over the image"
            )
        image = _grey(image).resize(image_size, Image.Resampling.LANCZOS)
    image = fit_image(_grey(image), width, height, fit)
    image = image.point([0 if level < 128 else 255 for level in range(256)])
    if feather > 0:
        image = image.filter(ImageFilter.GaussianBlur(feather))
    return np.asarray(image)


def _grey(mask: Image) -> Image:
    return mask if mask.mode == "L" else flatten(mask, "black").convert("L")


def _same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, with each side rounded up or down to whole pixels."""
    (width, height), (other_width, other_height) = sorted((size, other))
    # The scale is between (side - 1) / other_side and (side + 1) / other_side, for both sides.
    return (width - 1) * other_height < (height + 1) * other_width and (height - 1) * other_width < (
        width + 1
    ) * other_height


def latent_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """A mask at the latents' size, float32 from 0 to 1.

    Hard masks are sampled at the nearest pixel, as in diffusers; soft masks are averaged.
    """
    height, width = mask.shape
    if ((mask == 0) | (mask == 255)).all():
        return np.ascontiguousarray(mask[::factor, ::factor], np.float32) / 255
    cells = mask.reshape(height // factor, factor, width // factor, factor)
    return cells.mean(axis=(1, 3), dtype=np.float32) / 255


def to_signed(images: np.ndarray) -> np.ndarray:
    """Convert uint8 `[batch, height, width, 3]` to a VAE encoder's float32 `[batch, 3, height, width]` in [-1, 1]."""
    signed = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
    signed /= np.float32(127.5)
    signed -= np.float32(1)
    return signed


def resize_images(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize images uint8 `[batch, h, w, 3]` (Lanczos)."""
    from PIL import Image

    resized = [Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def resize_latents(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize latents float32 `[batch, channels, h, w]` (bicubic), each channel as a separate image."""
    from PIL import Image

    flat = latents.reshape(-1, *latents.shape[2:])
    resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in flat]
    return np.stack([np.asarray(plane, np.float32) for plane in resized]).reshape(*latents.shape[:2], height, width)


def paste(drawn: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blend drawn images uint8 `[batch, height, width, 3]` over the original, whose bytes stay where the mask is 0."""
    return core_paste(drawn, original, mask)
