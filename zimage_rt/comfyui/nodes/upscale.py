"""Enlarging images with a model."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import numpy as np

from ...errors import OutOfMemory
from ..graph import WorkflowError
from ..inputs import File, Socket
from ..registry import node
from ..resize import resize_images
from ..run import Run
from ..upscale.model import UpscaleModel, load_upscaler
from ..upscale.tiles import LEAST_TILE, TILE, count_tiles, upscale_in_tiles
from .sockets import MAX_SIZE, ImageIn

UpscaleModelIn = Annotated[UpscaleModel, Socket("UPSCALE_MODEL")]


@node("UpscaleModelLoader", "UPSCALE_MODEL", category="loaders")
def load_model(run: Run, model_name: Annotated[str, File("upscale_models")]) -> tuple[Any, ...]:
    """An ESRGAN-type model."""
    return (load_upscaler(run.files.upscaler(model_name), model_name),)


@node("ImageUpscaleWithModel", "IMAGE", category="image/upscaling")
def upscale(run: Run, upscale_model: UpscaleModelIn, image: ImageIn) -> tuple[Any, ...]:
    """Images enlarged by a model, one after another, in tiles; smaller tiles if memory does not suffice."""
    height, width = (size * upscale_model.scale for size in image.shape[1:3])
    if max(height, width) > MAX_SIZE:
        raise WorkflowError(f"image: expected at most {MAX_SIZE} pixels per side, got {width} by {height} as a result")
    planes = np.moveaxis(image[..., :3], -1, 1)
    tile = TILE
    while True:
        try:
            enlarged = _enlarged(run, planes, upscale_model, tile)
            break
        except MemoryError as error:
            tile //= 2
            if tile < LEAST_TILE:
                raise OutOfMemory(f"upscaling to {width} by {height} pixels: {error}; take a smaller image") from error
    found = np.ascontiguousarray(np.moveaxis(enlarged, 1, -1))
    if image.shape[-1] == 4:
        found = np.concatenate([found, resize_images(image[..., 3:], height, width, "bilinear")], axis=-1)
    return (found,)


def _enlarged(run: Run, planes: np.ndarray, model: UpscaleModel, tile: int) -> np.ndarray:
    """Planes, float32 `[batch, 3, height, width]`, enlarged. Raises MemoryError, Cancelled."""
    batch, _, height, width = planes.shape
    done, count = itertools.count(1), batch * count_tiles(height, width, tile)

    def enlarge(part: np.ndarray) -> np.ndarray:
        found = model(part)
        run.tell(next(done), count)
        return found

    found = np.empty((batch, 3, height * model.scale, width * model.scale), np.float32)
    for number in range(batch):
        image = np.ascontiguousarray(planes[number : number + 1])
        found[number] = upscale_in_tiles(image, enlarge, model.scale, tile)[0]
    return found
