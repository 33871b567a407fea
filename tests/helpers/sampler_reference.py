"""The sampler loop and its guidance in numpy: the reference of the loops in C++."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zimage_rt.sampling.schedules import add_noise
from zimage_rt.sampling.tables import HISTORY


def apply_guidance(positive: np.ndarray, negative: np.ndarray, scale: float, normalization: float = 0.0) -> np.ndarray:
    """Combine predictions `[batch, ...]`, sample by sample.

    `normalization` > 0 limits the guided norm to that multiple of the positive norm.
    """
    if scale <= 0:
        return positive
    guided = positive + np.float32(scale) * (positive - negative)
    if normalization > 0:
        axes = tuple(range(1, positive.ndim))
        limit = normalization * np.sqrt(np.sum(np.square(positive, dtype=np.float64), axis=axes))
        norms = np.sqrt(np.sum(np.square(guided, dtype=np.float64), axis=axes))
        factor = np.where(norms > limit, limit / np.maximum(norms, 1e-30), 1.0)
        guided *= factor.astype(np.float32).reshape(-1, *[1] * (positive.ndim - 1))
    return guided


def blend_kept(
    latents: np.ndarray, mask: np.ndarray, image: np.ndarray, noise: np.ndarray, sigma: np.float32
) -> np.ndarray:
    """The latents with the image's own, at noise level `sigma`, where the mask is 0."""
    return (np.float32(1) - mask) * add_noise(image, noise, sigma) + mask * latents


def sample_reference(
    predict: Callable[[np.ndarray, float, bool, np.ndarray], None],
    steps: np.ndarray,
    latents: np.ndarray,
    guidance_scales: np.ndarray,
    cfg_normalization: float,
    inpaint: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    step_noise: np.ndarray | None = None,
) -> np.ndarray:
    """The reference of the C++ loop in numpy, with the arguments of `_core.sample` but no callback.

    `predict(latents, timestep, guided, noise_pred)` fills `noise_pred`, `[batch, ...]`, or `[2 * batch, ...]`
    (positive, then negative) if `guided`; `inpaint` is (mask, image, noise).
    """
    latents = np.array(latents, dtype=np.float32)
    kept = np.zeros((HISTORY, *latents.shape), np.float32)
    drawn = iter(() if step_noise is None else step_noise)
    batch = latents.shape[0]
    for row, scales in zip(steps, guidance_scales, strict=True):
        sigma, sigma_next, x, pred, *history, noise, keep_x, keep_pred, slot, ends = row
        timestep, guided = float(np.float32(1) - sigma), bool((scales > 0).any())
        noise_pred = np.empty((batch * (2 if guided else 1), *latents.shape[1:]), np.float32)
        predict(latents, timestep, guided, noise_pred)
        if guided:
            positive, negative = noise_pred[:batch], noise_pred[batch:]
            noise_pred = np.concatenate(
                [
                    apply_guidance(positive[i : i + 1], negative[i : i + 1], float(scale), cfg_normalization)
                    for i, scale in enumerate(scales)
                ]
            )
        after = x * latents + pred * noise_pred
        for weight, array in zip(history, kept, strict=True):
            after += weight * array
        if noise:
            after += noise * next(drawn)
        if keep_x or keep_pred:
            kept[int(slot)] = keep_x * latents + keep_pred * noise_pred
        latents = after
        if ends and inpaint is not None:
            latents = blend_kept(latents, *inpaint, sigma_next)
    return latents
