"""Filters of images: edges, blur, sharpness, blends."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from ..canny import canny
from ..graph import WorkflowError
from ..inputs import Choice, Number, Whole
from ..registry import node
from ..run import Run
from .compose import sized
from .sockets import ImageIn, Share

Threshold = Annotated[float, Number(0.01, 0.99)]
Radius = Annotated[int, Whole(1, 31)]
Sigma = Annotated[float, Number(0.1, 10.0)]
BLENDS = ("normal", "multiply", "screen", "overlay", "soft_light", "difference")


@node("Canny", "IMAGE", category="image/preprocessors")
def edges(run: Run, image: ImageIn, low_threshold: Threshold = 0.4, high_threshold: Threshold = 0.8) -> tuple[Any, ...]:
    """The edges of an image, white on black."""
    del run
    if low_threshold > high_threshold:
        raise WorkflowError(f"low_threshold: expected at most {high_threshold:g}, got {low_threshold:g}")
    if min(image.shape[1:3]) < 3:
        raise WorkflowError(f"image: expected sides of 3 pixels or more, got {image.shape[2]} by {image.shape[1]}")
    return (np.repeat(canny(image[..., :3], low_threshold, high_threshold)[..., None], 3, axis=-1),)


@node("ImageBlur", "IMAGE", category="image/postprocessing")
def blur(run: Run, image: ImageIn, blur_radius: Radius = 1, sigma: Sigma = 1.0) -> tuple[Any, ...]:
    """A blurred image; `sigma` is in radiuses."""
    del run
    return (_gaussian(image, blur_radius, sigma).astype(np.float32),)


@node("ImageSharpen", "IMAGE", category="image/postprocessing")
def sharpen(
    run: Run,
    image: ImageIn,
    sharpen_radius: Radius = 1,
    sigma: Sigma = 1.0,
    alpha: Annotated[float, Number(0.0, 5.0)] = 1.0,
) -> tuple[Any, ...]:
    """An image with ten times `alpha` of its difference from its blur added."""
    del run
    sharp = image + 10 * alpha * (image - _gaussian(image, sharpen_radius, sigma))
    return (np.clip(sharp, 0, 1).astype(np.float32),)


@node("ImageBlend", "IMAGE", category="image/postprocessing")
def blend(
    run: Run,
    image1: ImageIn,
    image2: ImageIn,
    blend_factor: Share = 0.5,
    blend_mode: Annotated[str, Choice(BLENDS)] = "normal",
) -> tuple[Any, ...]:
    """A mixture of an image with its blend with another, which gets its size."""
    del run
    if image1.shape != image2.shape:
        image2 = sized(image2, 1, image1.shape[1], image1.shape[2], "bicubic")
    if 1 not in (len(image1), len(image2)) and len(image1) != len(image2):
        raise WorkflowError(f"image2: expected 1 or {len(image1)} images, got {len(image2)}")
    factor = np.float32(blend_factor)
    mixed = image1 * (np.float32(1) - factor) + _blended(image1, image2, blend_mode) * factor
    return (np.clip(mixed, 0, 1).astype(np.float32),)


def _blended(one: np.ndarray, other: np.ndarray, mode: str) -> np.ndarray:
    if mode == "multiply":
        return one * other
    if mode == "screen":
        return 1 - (1 - one) * (1 - other)
    if mode == "overlay":
        return np.where(one <= 0.5, 2 * one * other, 1 - 2 * (1 - one) * (1 - other))
    if mode == "soft_light":  # of the W3C's compositing
        root = np.where(one <= 0.25, ((16 * one - 12) * one + 4) * one, np.sqrt(np.maximum(one, 0)))
        return np.where(other <= 0.5, one - (1 - 2 * other) * one * (1 - one), one + (2 * other - 1) * (root - one))
    return one - other if mode == "difference" else other


def _gaussian(images: np.ndarray, radius: int, sigma: float) -> np.ndarray:
    """float64 images, blurred by a square of pixels; the borders are reflected."""
    if radius >= min(images.shape[1:3]):
        raise WorkflowError(f"radius: expected less than the image's sides, got {radius}")
    # The square's Gaussian is a product of two; its sides are from -1 to 1.
    weights = np.exp(-(np.linspace(-1, 1, 2 * radius + 1) ** 2) / (2 * sigma * sigma))
    weights /= weights.sum()
    for axis in (1, 2):
        widths = [(0, 0)] * 4
        widths[axis] = (radius, radius)
        padded, size = np.pad(images, widths, mode="reflect"), images.shape[axis]
        images = np.zeros(images.shape)
        for at, weight in enumerate(weights):
            images += weight * padded[(slice(None),) * axis + (slice(at, at + size),)]
    return images
