"""Samplers as tables: each is a list of function evaluations with a linear update behind them.

The loop that runs a table is one and in C++ (`csrc/runtime/sampler.cc`); `sample_reference` is what it is held to.
Notation: x are the latents, v the prediction, sign flipped, so that dx/dsigma = v and the clean picture is x - sigma v.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np

from .guidance import apply_guidance
from .schedule import add_noise


@dataclasses.dataclass(frozen=True)
class SamplerStep:
    """One row: an evaluation at `sigma`, and the linear update behind it.

    `csrc/include/zimage_rt/sampler.h` has the same fields in the same order, and says what they do.
    """

    sigma: float
    sigma_next: float
    x: float = 1.0
    pred: float = 0.0
    history: float = 0.0
    keep_x: float = 0.0
    keep_pred: float = 0.0
    ends: float = 1.0


def _euler(sigmas: np.ndarray) -> list[SamplerStep]:
    # The difference in float32, as diffusers takes it.
    return [
        SamplerStep(float(sigma), float(following), pred=float(following - sigma))
        for sigma, following in itertools.pairwise(sigmas)
    ]


def _heun(sigmas: np.ndarray) -> list[SamplerStep]:
    """Heun's second order: the mean of the slopes at both ends; the last step, to 0, is Euler's."""
    steps: list[SamplerStep] = []
    for sigma, following in itertools.pairwise(sigmas.astype(np.float64)):
        delta = following - sigma
        if following == 0.0:
            steps.append(SamplerStep(sigma, following, pred=delta))
            continue
        steps.append(SamplerStep(sigma, following, pred=delta, keep_pred=1.0, ends=0.0))
        # The whole step was taken with the first slope; half of it is taken back for half of the second one.
        steps.append(SamplerStep(following, following, pred=delta / 2, history=-delta / 2))
    return steps


def _half_log_snr(sigma: float) -> float:
    """log(alpha / sigma) with alpha = 1 - sigma."""
    if sigma >= 1.0:
        return -math.inf
    return math.inf if sigma <= 0.0 else math.log1p(-sigma) - math.log(sigma)


def _dpmpp_2m(sigmas: np.ndarray) -> list[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022) for flow models, as diffusers' DPMSolverMultistepScheduler has it (midpoint).

    Of first order at the first step, after a step from pure noise, and at the last.
    """
    steps: list[SamplerStep] = []
    before = -math.inf  # lambda of the last step's start
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas.astype(np.float64))):
        here, there = _half_log_snr(sigma), _half_log_snr(following)
        # alpha_t (1 - exp(-h)), the weight of the clean picture; h is infinite from pure noise and to a clean picture.
        weight = (1 - following) * -math.expm1(here - there)
        second = 0.0
        if i > 0 and following > 0.0 and math.isfinite(before):
            second = 0.5 * weight * (there - here) / (here - before)
        clean = weight + second
        steps.append(
            SamplerStep(
                sigma,
                following,
                x=following / sigma + clean,
                pred=-sigma * clean,
                history=-second,
                keep_x=1.0,
                keep_pred=-sigma,
            )
        )
        before = here
    return steps


# ComfyUI's names.
SAMPLERS: dict[str, Callable[[np.ndarray], list[SamplerStep]]] = {
    "euler": _euler,
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
}


def sampler_table(sampler: str, sigmas: np.ndarray) -> np.ndarray:
    """The rows of a sampler over a schedule, float32 `[evaluations, 8]`: the loop's argument."""
    return np.array([dataclasses.astuple(step) for step in SAMPLERS[sampler](sigmas)], np.float32)


def blend_kept(
    latents: np.ndarray, mask: np.ndarray, image: np.ndarray, noise: np.ndarray, sigma: np.float32
) -> np.ndarray:
    """Keep the picture where the mask is 0: its latents at the noise level that the others have reached."""
    return (np.float32(1) - mask) * add_noise(image, noise, sigma) + mask * latents


def sample_reference(
    predict: Callable[[np.ndarray, float, bool, np.ndarray], None],
    steps: np.ndarray,
    latents: np.ndarray,
    guidance_scales: np.ndarray,
    cfg_normalization: float,
    inpaint: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The C++ loop's reference, in numpy: the arguments of `_core.sample` without a callback.

    `predict(latents, timestep, guided, noise_pred)` fills `noise_pred`, `[batch, ...]`, or `[2 * batch, ...]`
    (positive, then negative) where `guided`; `inpaint` is (mask, image, noise).
    """
    latents = np.array(latents, dtype=np.float32)
    kept = np.zeros_like(latents)
    batch = latents.shape[0]
    for row, scales in zip(steps, guidance_scales, strict=True):
        sigma, sigma_next, x, pred, history, keep_x, keep_pred, ends = row
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
        after = x * latents + pred * noise_pred + history * kept
        if keep_x or keep_pred:
            kept = keep_x * latents + keep_pred * noise_pred
        latents = after
        if ends and inpaint is not None:
            latents = blend_kept(latents, *inpaint, sigma_next)
    return latents
