"""Noise schedules as pure functions: how sigma goes from 1 to 0.

The shift is the checkpoint's: `shift * s / (1 + (shift - 1) * s)`, 3.0 for Z-Image-Turbo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .beta import beta_quantile


def flow_match_sigmas(num_inference_steps: int, shift: float) -> np.ndarray:
    """Sigmas of flow-match Euler, 1 → 0: what `_core.flow_match_sigmas` is held to.

    `linspace(1, 1/N, N)`, shifted, then 0 (diffusers' FlowMatchEulerDiscreteScheduler, as ZImagePipeline drives it).

    Args:
        num_inference_steps: N, the number of steps; at least 1.
        shift: timestep shift; positive.

    Returns:
        float32 `[N + 1]`.
    """
    n = num_inference_steps
    if n < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {n}")
    if not shift > 0:
        raise ValueError(f"shift: expected a positive number, got {shift}")
    return custom_sigmas((n - np.arange(n, dtype=np.float64)) / n, shift)


def custom_sigmas(sigmas: Sequence[float] | np.ndarray, shift: float) -> np.ndarray:
    """Given sigmas, before the shift and without the last 0, as diffusers' `sigmas` argument has them."""
    values = np.asarray(sigmas, np.float64).astype(np.float32)
    # In float32, as diffusers computes it: the sigmas are then its own to the last place or so.
    shifted = np.float32(shift) * values / (np.float32(1) + np.float32(shift - 1) * values)
    return np.append(shifted, np.float32(0))


def _between(sigmas: np.ndarray, spread: Callable[[float, float, int], np.ndarray]) -> np.ndarray:
    """The first and the last sigma stay; those between them are spread anew."""
    if len(sigmas) < 3:
        return sigmas
    values = spread(float(sigmas[-2]), float(sigmas[0]), len(sigmas) - 1)
    return np.append(values, 0.0).astype(np.float32)


def _karras(low: float, high: float, count: int) -> np.ndarray:
    rho = 7.0  # Karras et al. 2022, equation 5
    ramp = np.linspace(0, 1, count)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def _exponential(low: float, high: float, count: int) -> np.ndarray:
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def _beta(low: float, high: float, count: int) -> np.ndarray:
    # "Beta Sampling is All You Need", Lee et al. 2024: alpha = beta = 0.6.
    return low + np.array([beta_quantile(p, 0.6) for p in np.linspace(1, 0, count)]) * (high - low)


def _normal(num_inference_steps: int, shift: float) -> np.ndarray:
    """ComfyUI's: evenly spaced timesteps down to the smallest of a thousand shifted sigmas."""
    smallest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    return custom_sigmas(np.linspace(1.0, smallest, num_inference_steps), shift)


# ComfyUI's names. `simple` is Z-Image's own; the others stretch it as diffusers' use_…_sigmas options do.
SCHEDULES: dict[str, Callable[[int, float], np.ndarray]] = {
    "simple": flow_match_sigmas,
    "normal": _normal,
    "karras": lambda n, shift: _between(flow_match_sigmas(n, shift), _karras),
    "exponential": lambda n, shift: _between(flow_match_sigmas(n, shift), _exponential),
    "beta": lambda n, shift: _between(flow_match_sigmas(n, shift), _beta),
}


def first_step(num_inference_steps: int, strength: float) -> int:
    """Which step image-to-image begins with: of N steps the last `strength * N` are run.

    As `get_timesteps` of diffusers' ZImageImg2ImgPipeline, rounding included.
    """
    return int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))


def add_noise(image: np.ndarray, noise: np.ndarray, sigma: np.float32) -> np.ndarray:
    """Latents of a picture at a noise level: `sigma * noise + (1 - sigma) * image`, float32."""
    return sigma * noise + (np.float32(1) - sigma) * image
