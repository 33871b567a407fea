"""The flow-match schedule in numpy: the reference that the C++ loop is held to."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from . import _core
from .guidance import apply_guidance, guidance_active


def flow_match_sigmas(num_inference_steps: int, shift: float) -> np.ndarray:
    """Sigmas of flow-match Euler, 1 → 0.

    `linspace(1, 1/N, N)`, then `shift * s / (1 + (shift - 1) * s)`, then 0 (diffusers'
    FlowMatchEulerDiscreteScheduler, as ZImagePipeline drives it).

    Args:
        num_inference_steps: N, the number of function evaluations; at least 1.
        shift: timestep shift, 3.0 for Z-Image-Turbo; positive.

    Returns:
        float32 `[N + 1]`.
    """
    n = num_inference_steps
    if n < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {n}")
    if not shift > 0:
        raise ValueError(f"shift: expected a positive number, got {shift}")
    sigmas = ((n - np.arange(n, dtype=np.float64)) / n).astype(np.float32)
    # In float32, as diffusers computes it: the sigmas are then its own to the last place or so.
    shifted = np.float32(shift) * sigmas / (np.float32(1) + np.float32(shift - 1) * sigmas)
    return np.append(shifted, np.float32(0))


def sample_euler(
    predict: Callable[[np.ndarray, float, bool, np.ndarray], None],
    sigmas: np.ndarray,
    latents: np.ndarray,
    guidance: _core.Guidance,
) -> np.ndarray:
    """The C++ loop's reference, in numpy: same arguments as `_core.sample_euler` without a callback.

    `predict(latents, timestep, guided, noise_pred)` fills `noise_pred`, `[batch, ...]`, or
    `[2 * batch, ...]` (positive, then negative) where `guided`.
    """
    latents = np.array(latents, dtype=np.float32)
    batch = latents.shape[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        timestep = float(np.float32(1) - np.float32(sigma))
        guided = guidance_active(guidance.scale, guidance.truncation, timestep)
        noise_pred = np.empty((batch * (2 if guided else 1), *latents.shape[1:]), np.float32)
        predict(latents, timestep, guided, noise_pred)
        if guided:
            noise_pred = apply_guidance(noise_pred[:batch], noise_pred[batch:], guidance.scale, guidance.normalization)
        latents += (np.float32(sigma_next) - np.float32(sigma)) * noise_pred
    return latents
