"""Sigmas: schedules between two ends, and lists that are cut, reversed and changed."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Number, Whole
from ..registry import node
from ..run import Run
from .sockets import Share, SigmasIn, Steps

# ComfyUI's own ends are those of Stable Diffusion; Z-Image's sigmas reach from 1 to about 0.003.
End = Annotated[float, Number(0.0, 5000.0)]
Rho = Annotated[float, Number(0.0, 100.0)]
Strength = Annotated[float, Number(0.0, 100.0)]
HIGHEST, LOWEST = 14.614642, 0.0291675


@node("KarrasScheduler", "SIGMAS", category="sampling/custom_sampling/schedulers")
def karras(
    run: Run, steps: Steps = 20, sigma_max: End = HIGHEST, sigma_min: End = LOWEST, rho: Rho = 7.0
) -> tuple[Any, ...]:
    """Sigmas whose roots of degree `rho` are even (Karras et al. 2022, equation 5)."""
    del run
    if not rho:
        raise WorkflowError("rho: expected more than 0, got 0")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (_ended((high + _ramp(steps) * np.float32(low - high)) ** np.float32(rho)),)


@node("ExponentialScheduler", "SIGMAS", category="sampling/custom_sampling/schedulers")
def exponential(run: Run, steps: Steps = 20, sigma_max: End = HIGHEST, sigma_min: End = LOWEST) -> tuple[Any, ...]:
    """Sigmas whose logarithms are even."""
    return polyexponential(run, steps, sigma_max, sigma_min, 1.0)


@node("PolyexponentialScheduler", "SIGMAS", category="sampling/custom_sampling/schedulers")
def polyexponential(
    run: Run, steps: Steps = 20, sigma_max: End = HIGHEST, sigma_min: End = LOWEST, rho: Rho = 1.0
) -> tuple[Any, ...]:
    """Sigmas whose logarithms fall as a power of the step."""
    del run
    if not sigma_max or not sigma_min:
        raise WorkflowError(f"sigma_max and sigma_min: expected more than 0, got {sigma_max:g} and {sigma_min:g}")
    high, low = math.log(sigma_max), math.log(sigma_min)
    # One step alone has the highest sigma.
    ramp = 1 - _ramp(steps).astype(np.float64)
    return (_ended(np.exp(ramp**rho * (high - low) + low)),)


@node("SplitSigmas", "SIGMAS", "SIGMAS", category="sampling/custom_sampling/sigmas")
def split(run: Run, sigmas: SigmasIn, step: Annotated[int, Whole(0, 10_000)] = 0) -> tuple[Any, ...]:
    """The sigmas of the steps before one, and of those from it on."""
    del run
    return sigmas[: step + 1], sigmas[step:]


@node("SplitSigmasDenoise", "SIGMAS", "SIGMAS", category="sampling/custom_sampling/sigmas")
def split_denoise(run: Run, sigmas: SigmasIn, denoise: Share = 1.0) -> tuple[Any, ...]:
    """The sigmas before the last share of the steps, and of that share."""
    del run
    count = round(max(len(sigmas) - 1, 0) * denoise)
    # Without a last step the first list is empty, as in ComfyUI.
    return sigmas[: len(sigmas) - count if count else 0], sigmas[-(count + 1) :]


@node("FlipSigmas", "SIGMAS", category="sampling/custom_sampling/sigmas")
def flip(run: Run, sigmas: SigmasIn) -> tuple[Any, ...]:
    """Sigmas from the last to the first; a first one of 0 becomes 0.0001."""
    del run
    found = sigmas[::-1].copy()
    if len(found) and found[0] == 0:
        found[0] = 0.0001
    return (found,)


@node("SetFirstSigma", "SIGMAS", category="sampling/custom_sampling/sigmas")
def set_first(run: Run, sigmas: SigmasIn, sigma: Annotated[float, Number(0.0, 20_000.0)] = 136.0) -> tuple[Any, ...]:
    """Sigmas with another at the beginning."""
    del run
    if not len(sigmas):
        raise WorkflowError("sigmas: expected one or more, got none")
    found = sigmas.copy()
    found[0] = sigma
    return (found,)


@node("SamplerEulerAncestral", "SAMPLER", category="sampling/custom_sampling/samplers")
def euler_ancestral(run: Run, eta: Strength = 1.0, s_noise: Strength = 1.0) -> tuple[Any, ...]:
    """The sampler euler_ancestral, here with its own strength of noise alone."""
    del run
    if eta != 1 or s_noise != 1:
        raise WorkflowError(f"eta and s_noise: expected 1 and 1, got {eta:g} and {s_noise:g}; others are not served")
    return ("euler_ancestral",)


def _ramp(count: int) -> np.ndarray:
    """float32 from 0 to 1."""
    return np.linspace(0, 1, count, dtype=np.float32)


def _ended(sigmas: np.ndarray) -> np.ndarray:
    """float32 with a 0 after them."""
    return np.append(sigmas, 0).astype(np.float32)
