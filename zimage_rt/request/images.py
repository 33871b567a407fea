"""The input images of a request, read and fitted, and the output size that follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import checks, limits
from ..bundle.manifest import Manifest, ShapeRange
from ..errors import RequestError
from ..image.convert import FITS, fit_image, flatten, read_image, read_mask

if TYPE_CHECKING:
    from PIL.Image import Image

    from .types import GenerateRequest

# Handling of a size that is no multiple of the bundle's: refuse it, or take the nearest that is served.
FIT_SIZES = ("exact", "nearest")


def read_control_image(request: GenerateRequest, manifest: Manifest, notes: list[str]) -> Image | None:
    """The control image at its own size; None if there is none. Raises RequestError for a bundle without ControlNet."""
    if request.control_image is None:
        return None
    if "controlnet" not in manifest.modules:
        raise RequestError(
            "control_image: this bundle has no ControlNet; export it again with one: "
            "zimage-export … --controlnet PATH, or `controlnet` under [parts] of the recipe"
        )
    return read_image(request.control_image, "control_image", notes)


def fit_pixels(image: Image, width: int, height: int, fit: str) -> np.ndarray:
    """An image's pixels at another size, uint8 `[height, width, 3]`; `fit` is one of `FITS`."""
    return np.asarray(fit_image(flatten(image), width, height, checks.choice(fit, "fit", FITS)), np.uint8)


def image_and_mask(
    request: GenerateRequest, given: Image | None, height: int, width: int, notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The image, uint8 `[height, width, 3]`, and its mask, uint8 `[height, width]`; None for each that is missing."""
    fit = checks.choice(request.fit, "fit", FITS)
    feather = checks.number(request.mask_feather, "mask_feather", limits.MAX_FEATHER)
    if given is None:
        if request.mask is not None:
            raise RequestError("mask: expected an image that it belongs to; give `image` too")
        return None, None
    if request.latents is not None:
        raise RequestError("image and latents: expected one of them; both say what to begin with", field="image")
    image = fit_pixels(given, width, height, fit)
    if request.mask is None:
        return image, None
    mask = read_mask(read_image(request.mask, "mask", notes), given.size, width, height, fit, feather)
    if not mask.any():
        raise RequestError("mask: expected some white, where to draw; got none, so that nothing would change")
    return image, mask


def side(
    request: GenerateRequest, manifest: Manifest, name: str, image: Image | None, image_latents: np.ndarray | None
) -> int:
    """The `height` or `width` of a request, from its field, its image, its latents or the bundle, in this order."""
    allowed = getattr(manifest.shapes, name)
    value = getattr(request, name)
    size = allowed.opt if value is None else checks.integer(value, name, 1, limits.MAX_SIDE)
    if value is None and image is not None:
        size = getattr(image, name) // allowed.multiple * allowed.multiple
    elif value is None and image_latents is not None and image_latents.ndim == 4:
        # Other shapes are refused later, by the check of all latents.
        size = image_latents.shape[2 if name == "height" else 3] * manifest.pipeline.vae_scale_factor
    near = [] if value is None else _nearest(size, allowed)
    if checks.choice(request.fit_size, "fit_size", FIT_SIZES) == "nearest" and near:
        return near[0]
    if size not in allowed:
        if near:
            which = f"are {min(near)} and {max(near)}: choose one" if len(near) > 1 else f"is {near[0]}: choose it"
            raise RequestError(
                f"{name}: expected {allowed.min} to {allowed.max} in steps of {allowed.multiple}, got {size}; the "
                f"nearest {which}, or let fit_size='nearest' take {near[0]}"
            )
        if value is None and image is not None:
            source = "control_image" if request.image is None else "image"
            raise RequestError(
                f"{name}: expected {allowed.min} to {allowed.max} in steps of {allowed.multiple}, got "
                f"{getattr(image, name)} from the {source}; give height and width to scale it"
            )
        raise RequestError(
            f"{name}: expected {allowed.min} to {allowed.max} in steps of {allowed.multiple}, "
            f"got {size}; choose a size in that range, or export the bundle with a wider one"
        )
    return size


def _nearest(size: int, allowed: ShapeRange) -> list[int]:
    """The served sizes next to one between two steps, the nearest first, the smaller first if both are as near."""
    below = size // allowed.multiple * allowed.multiple
    around = () if size == below else (below, below + allowed.multiple)
    return sorted((value for value in around if value in allowed), key=lambda value: abs(value - size))
