"""Latents to images: whole, in tiles, and as previews while they are drawn."""

from __future__ import annotations

import functools

import numpy as np

from .backends.base import OnStep, Pipeline, ReadLatents
from .bundle.manifest import Manifest
from .image.tiled_decode import decode_tiled
from .request.resolve import resolve_vae
from .request.types import Callback, StepInfo
from .stages import Stages


def decode(
    pipeline: Pipeline,
    manifest: Manifest,
    latents: np.ndarray,
    vae: str,
    tile: int | None = None,
    stages: Stages | None = None,
) -> np.ndarray:
    """Latents to uint8 images `[batch, height, width, 3]`, whole or in tiles of `tile` pixels."""
    if tile is None:
        return pipeline.decode(latents, vae)
    told = functools.partial((stages or Stages()).tell, "decode")
    factor = manifest.pipeline.vae_scale_factor
    return decode_tiled(lambda part: pipeline.decode(part, vae), latents, tile, factor, told)


def on_step_of(callback: Callback | None, pipeline: Pipeline, manifest: Manifest, stage: int = 0) -> OnStep | None:
    """What the sampler's loop calls after a step, for a callback that takes a StepInfo."""
    if callback is None:
        return None

    def on_step(step: int, count: int, sigma: float, sigma_next: float, read: ReadLatents) -> bool:
        latents = functools.cache(read)  # copied from the device once, and only if the callback asks

        def preview() -> np.ndarray:
            return decode(pipeline, manifest, latents(), resolve_vae("tiny", manifest))

        return callback(StepInfo(step, count, sigma, sigma_next, latents, preview, stage)) is not False

    return on_step
