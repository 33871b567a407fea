"""Images: loading, resizing, saving."""

from __future__ import annotations

import io
import math
from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Choice, File, InputError, Number, Socket, Whole
from ..prefix import Prefix
from ..registry import node
from ..resize import resize_images, to_8_bits
from ..run import Made, Run
from .latents import centre
from .sockets import Crop, Factor, ImageIn, Method, Pixels

CHANNELS = ("alpha", "red", "green", "blue")
MaybeImage = Annotated[np.ndarray | None, Socket("IMAGE")]


@node("LoadImage", "IMAGE", "MASK", category="image")
def load_image(run: Run, image: Annotated[str, File("input")]) -> tuple[Any, ...]:
    """An image, and where it is transparent; without alpha a mask of 64 by 64 zeros."""
    pixels = _read(run, image)
    has_alpha = pixels.shape[2] == 4
    mask = 1 - pixels[..., 3] if has_alpha else np.zeros((64, 64), np.float32)
    return np.ascontiguousarray(pixels[None, ..., :3]), np.ascontiguousarray(mask[None], np.float32)


@node("LoadImageMask", "MASK", category="mask")
def load_mask(
    run: Run, image: Annotated[str, File("input")], channel: Annotated[str, Choice(CHANNELS)] = "alpha"
) -> tuple[Any, ...]:
    """A channel of an image; alpha is inverted, as in ComfyUI."""
    pixels = _read(run, image)
    if channel != "alpha":
        return (np.ascontiguousarray(pixels[None, ..., CHANNELS.index(channel) - 1]),)
    mask = 1 - pixels[..., 3] if pixels.shape[2] == 4 else np.zeros(pixels.shape[:2], np.float32)
    return (np.ascontiguousarray(mask[None], np.float32),)


@node("ImageScale", "IMAGE", category="image/upscaling")
def scale(
    run: Run,
    image: ImageIn,
    upscale_method: Method = "nearest-exact",
    width: Pixels = 512,
    height: Pixels = 512,
    crop: Crop = "disabled",
) -> tuple[Any, ...]:
    """An image of another size; a side of 0 keeps the aspect ratio."""
    del run
    rows, columns = image.shape[1:3]
    if not width and not height:
        return (image,)
    width = width or max(1, round(columns * height / rows))
    height = height or max(1, round(rows * width / columns))
    if crop == "center":
        vertical, horizontal = centre(rows, columns, height, width)
        image = image[:, vertical, horizontal]
    return (resize_images(image, height, width, upscale_method),)


@node("ImageScaleBy", "IMAGE", category="image/upscaling")
def scale_by(
    run: Run, image: ImageIn, upscale_method: Method = "nearest-exact", scale_by: Factor = 1.0
) -> tuple[Any, ...]:
    """An image of a multiple of its size."""
    del run
    height, width = (max(1, round(side * scale_by)) for side in image.shape[1:3])
    return (resize_images(image, height, width, upscale_method),)


@node("ImageScaleToTotalPixels", "IMAGE", category="image/upscaling")
def scale_to_pixels(
    run: Run,
    image: ImageIn,
    upscale_method: Method = "nearest-exact",
    megapixels: Annotated[float, Number(0.01, 16.0)] = 1.0,
    resolution_steps: Annotated[int, Whole(1, 256)] = 1,
) -> tuple[Any, ...]:
    """An image of so many times 1024² pixels, its sides multiples of `resolution_steps`."""
    del run
    factor = math.sqrt(megapixels * 1024 * 1024 / (image.shape[1] * image.shape[2]))
    height, width = (max(1, round(side * factor / resolution_steps)) * resolution_steps for side in image.shape[1:3])
    return (resize_images(image, height, width, upscale_method),)


@node("ImageScaleToMaxDimension", "IMAGE", category="image/upscaling")
def scale_to_side(
    run: Run, image: ImageIn, upscale_method: Method = "area", largest_size: Pixels = 512
) -> tuple[Any, ...]:
    """An image whose longer side is given."""
    del run
    rows, columns = image.shape[1:3]
    factor = largest_size / max(rows, columns)
    size = (largest_size if side == max(rows, columns) else round(side * factor) for side in (rows, columns))
    height, width = size
    return (resize_images(image, max(1, height), max(1, width), upscale_method),)


@node("ImageInvert", "IMAGE", category="image")
def invert(run: Run, image: ImageIn) -> tuple[Any, ...]:
    """The negative of an image."""
    del run
    return (np.float32(1) - image,)


@node("ImageBatch", "IMAGE", category="image")
def batch(run: Run, image1: ImageIn, image2: ImageIn) -> tuple[Any, ...]:
    """Two batches as one; the second gets the first one's size."""
    if image1.shape[1:] != image2.shape[1:]:
        (image2,) = scale(run, image2, "bilinear", image1.shape[2], image1.shape[1], "center")
    return (np.concatenate([image1, image2]),)


@node("GetImageSize", "INT", "INT", "INT", category="image")
def size(run: Run, image: ImageIn) -> tuple[Any, ...]:
    """Width, height, and the number of images."""
    del run
    return image.shape[2], image.shape[1], image.shape[0]


@node("SaveImage", category="image", is_output=True)
def save(run: Run, images: ImageIn, filename_prefix: Annotated[str, Prefix()] = "ComfyUI") -> tuple[Any, ...]:
    """Save images, cut off to 8 bits as ComfyUI does."""
    run.shown += [Made(run.node, to_8_bits(image), filename_prefix, False) for image in images]
    return ()


@node("PreviewImage", category="image", is_output=True)
def preview(run: Run, images: ImageIn) -> tuple[Any, ...]:
    """Show images."""
    run.shown += [Made(run.node, to_8_bits(image), "preview", True) for image in images]
    return ()


@node("SaveImageAdvanced", category="image", is_output=True)
def save_advanced(
    run: Run,
    images: ImageIn,
    filename_prefix: Annotated[str, Prefix()] = "ComfyUI",
    format: Annotated[str, Choice(("png",))] = "png",
    bit_depth: Annotated[str, Choice(("8-bit",))] = "8-bit",
    input_color_space: Annotated[str, Choice(("sRGB",))] = "sRGB",
) -> tuple[Any, ...]:
    """Save images; here as PNG of 8 bits alone."""
    del format, bit_depth, input_color_space
    return save(run, images, filename_prefix)


@node("ImageCompare", category="image", is_output=True)
def compare(run: Run, image_a: MaybeImage = None, image_b: MaybeImage = None) -> tuple[Any, ...]:
    """Show images beside each other."""
    for group, images in (("a_images", image_a), ("b_images", image_b)):
        if images is not None:
            run.shown += [Made(run.node, to_8_bits(image), "compare", True, group) for image in images]
    return ()


def _read(run: Run, name: str) -> np.ndarray:
    """An input image, float32 `[height, width, 3 or 4]`, upright. Raises WorkflowError."""
    from PIL import Image, ImageOps

    try:
        content = run.files.image(name)
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits of grey, which a conversion would cut off
                image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            mode = "RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB"
            pixels = np.asarray(image.convert(mode), np.float32)
    except InputError as error:
        raise WorkflowError(str(error)) from error
    except Exception as error:  # Pillow has no error of its own for damaged files
        raise WorkflowError(f"image: {name} cannot be read as an image: {error}") from error
    return pixels / np.float32(255)
