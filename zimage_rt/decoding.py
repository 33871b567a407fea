"""Latents to images: whole, in tiles, as previews while they are drawn; and images as floats, both ways."""

from __future__ import annotations

import functools

import numpy as np

from .backends.base import OnStep, Pipeline, ReadLatents
from .bundle.manifest import Manifest
from .image.tiled_decode import decode_tiled
from .not_finite import check_finite
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


def decode_floats(pipeline: Pipeline, latents: np.ndarray, vae: str) -> np.ndarray:
    """Latents to images float32 `[batch, height, width, 3]` from 0 to 1, which lie in memory as channels."""
    name = f"{vae}_vae_decoder"
    module = pipeline.module(name)
    parts = [module({"latents": np.ascontiguousarray(latents[i : i + 1])})["image"] for i in range(len(latents))]
    images = parts[0] if len(parts) == 1 else np.concatenate(parts)
    check_finite(images, name)
    if not images.flags.writeable:
        images = images.copy()
    images *= np.float32(0.5)  # in place: a new array of this size costs as much as the arithmetic
    images += np.float32(0.5)
    return np.clip(images, 0, 1, out=images).transpose(0, 2, 3, 1)


def encode_floats(pipeline: Pipeline, images: np.ndarray, vae: str) -> np.ndarray:
    """Images float32 `[batch, height, width, 3]` from 0 to 1 to latents."""
    name = f"{vae}_vae_encoder"
    signed = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) * np.float32(2) - np.float32(1)
    parts = [pipeline.module(name)({"image": signed[i : i + 1]})["latents"] for i in range(len(signed))]
    latents = np.concatenate(parts)
    check_finite(latents, name)
    return latents


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
