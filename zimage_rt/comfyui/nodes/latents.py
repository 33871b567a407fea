"""Latents: empty ones, those of images, their sizes, masks and batches."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np

from ..bislerp import BISLERP, bislerp
from ..graph import WorkflowError
from ..inputs import Whole
from ..registry import node
from ..resize import check_numbers, resize
from ..run import Run
from ..values import Latent, Vae, in_vae_space, repeated, with_vae_samples
from .sockets import MAX_SIZE, Batch, Crop, Factor, ImageIn, LatentIn, LatentMethod, MaskIn, VaeIn

# Pixels per latent, and channels of Z-Image's latents.
FACTOR, CHANNELS = 8, 16
# The engine's smallest tile, in pixels.
MIN_TILE = 128
Size = Annotated[int, Whole(16, 16384, step=16)]
SizeBy8 = Annotated[int, Whole(16, 16384, step=8)]
UpscaledSize = Annotated[int, Whole(0, MAX_SIZE, step=8)]


@node("EmptySD3LatentImage", "LATENT", category="latent/sd3")
def empty(run: Run, width: Size = 1024, height: Size = 1024, batch_size: Batch = 1) -> tuple[Any, ...]:
    """Latents of nothing, of which only noise is left at a denoise of 1."""
    del run
    shape = (batch_size, CHANNELS, height // FACTOR, width // FACTOR)
    check_numbers("batch_size", *shape)
    return (Latent(np.zeros(shape, np.float32)),)


@node("EmptyLatentImage", "LATENT", category="latent")
def empty_image(run: Run, width: SizeBy8 = 512, height: SizeBy8 = 512, batch_size: Batch = 1) -> tuple[Any, ...]:
    """The same: ComfyUI gives it the model's channels."""
    return empty(run, width, height, batch_size)


@node("VAEEncode", "LATENT", category="latent")
def vae_encode(run: Run, pixels: ImageIn, vae: VaeIn) -> tuple[Any, ...]:
    """The latents of images: the mean of the VAE's posterior."""
    return (Latent(encode(run, vae, pixels)),)


@node("VAEEncodeForInpaint", "LATENT", category="latent/inpaint")
def vae_encode_for_inpaint(
    run: Run, pixels: ImageIn, vae: VaeIn, mask: MaskIn, grow_mask_by: Annotated[int, Whole(0, 64)] = 6
) -> tuple[Any, ...]:
    """The latents of images that are grey under the mask; the mask becomes hard and grows."""
    height, width = pixels.shape[1:3]
    vertical, horizontal = _whole_latents(height, width)
    hard = np.rint(resize(mask[:, None], height, width, "bilinear"))[:, 0, vertical, horizontal]
    pixels = pixels[:, vertical, horizontal]
    grey = (pixels - 0.5) * (1 - hard[..., None]) + 0.5
    return (Latent(encode(run, vae, grey.astype(np.float32)), np.rint(_grown(hard, grow_mask_by))),)


@node("VAEDecode", "IMAGE", category="latent")
def vae_decode(run: Run, samples: LatentIn, vae: VaeIn) -> tuple[Any, ...]:
    """The images of latents."""
    return (_decoded(run, samples, vae, None),)


@node("VAEDecodeTiled", "IMAGE", category="_for_testing")
def vae_decode_tiled(
    run: Run,
    samples: LatentIn,
    vae: VaeIn,
    tile_size: Annotated[int, Whole(64, 4096)] = 512,
    overlap: Annotated[int, Whole(0, 4096)] = 64,
    temporal_size: Annotated[int, Whole(8, 4096)] = 64,
    temporal_overlap: Annotated[int, Whole(4, 4096)] = 8,
) -> tuple[Any, ...]:
    """The images of latents, decoded in tiles of at least 128 pixels; their overlap is the engine's own."""
    del overlap, temporal_size, temporal_overlap
    return (_decoded(run, samples, vae, max(tile_size, MIN_TILE)),)


@node("SetLatentNoiseMask", "LATENT", category="latent/inpaint")
def set_noise_mask(run: Run, samples: LatentIn, mask: MaskIn) -> tuple[Any, ...]:
    """Latents of which a sampler draws only what the mask marks."""
    del run
    return (dataclasses.replace(samples, mask=mask),)


@node("LatentUpscale", "LATENT", category="latent")
def upscale(
    run: Run,
    samples: LatentIn,
    upscale_method: LatentMethod = "nearest-exact",
    width: UpscaledSize = 512,
    height: UpscaledSize = 512,
    crop: Crop = "disabled",
) -> tuple[Any, ...]:
    """Latents of another size in pixels; a side of 0 keeps the aspect ratio."""
    del run
    rows, columns = samples.samples.shape[2:]
    if not width and not height:
        return (samples,)
    # At least 64 pixels a side, as ComfyUI has it.
    width = max(64, width or round(columns * height / rows))
    height = max(64, height or round(rows * width / columns))
    array = samples.samples
    if crop == "center":
        array = array[(..., *centre(rows, columns, height // FACTOR, width // FACTOR))]
    return (_resized(samples, array, height // FACTOR, width // FACTOR, upscale_method),)


@node("LatentUpscaleBy", "LATENT", category="latent")
def upscale_by(
    run: Run, samples: LatentIn, upscale_method: LatentMethod = "nearest-exact", scale_by: Factor = 1.5
) -> tuple[Any, ...]:
    """Latents of a multiple of their size."""
    del run
    rows, columns = (max(1, round(side * scale_by)) for side in samples.samples.shape[2:])
    return (_resized(samples, samples.samples, rows, columns, upscale_method),)


@node("LatentFromBatch", "LATENT", category="latent/batch")
def from_batch(
    run: Run,
    samples: LatentIn,
    batch_index: Annotated[int, Whole(0, 63)] = 0,
    length: Annotated[int, Whole(1, 64)] = 1,
) -> tuple[Any, ...]:
    """A part of a batch, which keeps its noise."""
    del run
    count = len(samples.samples)
    first = min(batch_index, count - 1)
    part = slice(first, first + min(length, count - first))
    mask = samples.mask
    if mask is not None and len(mask) > 1:
        mask = repeated(mask, count)[part]
    places = (samples.batch_index or tuple(range(count)))[part]
    return (Latent(samples.samples[part], mask, places),)


@node("RepeatLatentBatch", "LATENT", category="latent/batch")
def repeat(run: Run, samples: LatentIn, amount: Annotated[int, Whole(1, 64)] = 1) -> tuple[Any, ...]:
    """A batch several times over, each with noise of its own."""
    del run
    mask, places = samples.mask, samples.batch_index
    check_numbers("amount", amount, *samples.samples.shape)
    if mask is not None and len(mask) > 1:
        mask = np.tile(repeated(mask, len(samples.samples)), (amount, 1, 1))
    if places is not None:
        offset = max(places) - min(places) + 1
        places = tuple(place + round_ * offset for round_ in range(amount) for place in places)
    return (Latent(np.tile(samples.samples, (amount, 1, 1, 1)), mask, places),)


def _resized(latent: Latent, samples: np.ndarray, rows: int, columns: int, method: str) -> Latent:
    """A latent with samples of another size."""
    if method != BISLERP:
        return dataclasses.replace(latent, samples=resize(samples, rows, columns, method))
    return with_vae_samples(latent, bislerp(in_vae_space(samples), rows, columns))  # whose directions are ComfyUI's


def encode(run: Run, vae: Vae, pixels: np.ndarray) -> np.ndarray:
    """The latents of images `[batch, height, width, 3]`, cut in their middle to whole latents. Raises WorkflowError."""
    engine = run.engine(vae.bundle)
    if f"{vae.name}_vae_encoder" not in engine.manifest.modules:
        raise WorkflowError(f"vae: the bundle {vae.bundle} has no encoder of the {vae.name} VAE")
    vertical, horizontal = _whole_latents(*pixels.shape[1:3])
    cut = pixels[:, vertical, horizontal, :3]
    shapes = engine.manifest.shapes
    for name, size, served in (("height", cut.shape[1], shapes.height), ("width", cut.shape[2], shapes.width)):
        if not served.min <= size <= served.max:
            raise WorkflowError(f"pixels: expected a {name} of {served.min} to {served.max} pixels, got {size}")
    return engine.encode_image(np.ascontiguousarray(cut, np.float32), vae.name)


def _decoded(run: Run, latent: Latent, vae: Vae, tile: int | None) -> np.ndarray:
    """The images of latents, float32 `[batch, height, width, 3]` from 0 to 1."""
    engine = run.engine(vae.bundle)
    if tile is None:
        return engine.decode_floats(latent.samples, vae.name)
    return engine.decode(latent.samples, vae.name, tile).astype(np.float32) / np.float32(255)


def _whole_latents(height: int, width: int) -> tuple[slice, slice]:
    """The middle of an image that is whole latents."""
    starts = (height % FACTOR // 2, width % FACTOR // 2)
    sizes = (height // FACTOR * FACTOR, width // FACTOR * FACTOR)
    return slice(starts[0], starts[0] + sizes[0]), slice(starts[1], starts[1] + sizes[1])


def centre(rows: int, columns: int, height: int, width: int) -> tuple[slice, slice]:
    """The middle of an array that has the aspect ratio of another size."""
    if columns / rows > width / height:
        cut = round((columns - columns * (width / height) / (columns / rows)) / 2)
        return slice(None), slice(cut, columns - cut)
    cut = round((rows - rows * (columns / rows) / (width / height)) / 2)
    return slice(cut, rows - cut), slice(None)


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask grown by a square of so many pixels, the centre of which is at its right below the middle."""
    if pixels < 2:
        return mask
    before, grown = -(-(pixels - 1) // 2), mask
    for axis in (1, 2):
        padding = [(0, 0)] * 3
        padding[axis] = (before, before)
        padded = np.pad(grown, padding)
        size = grown.shape[axis]
        shifted = [padded.take(range(start, start + size), axis) for start in range(min(pixels, 2 * before + 1))]
        grown = np.max(shifted, axis=0)
    return grown
