"""A sampler node's work: noise, sigmas, the loop, and what ComfyUI makes of its end."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .._core import randn
from ..backends.base import Control, Inpaint
from ..denoise import DenoiseRequest
from ..engine import Engine
from ..request.types import Callback
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import SCHEDULES, denoise_sigmas, schedule_sigmas
from .graph import WorkflowError
from .resize import resize
from .values import Guider, Latent, Noise, repeated

# The samplers and schedules that give ComfyUI's numbers.
SAMPLER_NAMES = tuple(name for name, sampler in SAMPLERS.items() if sampler.source in ("ComfyUI", "both"))
# Steps of a schedule; ComfyUI's table has 1000 sigmas.
MAX_STEPS = 10_000
SCHEDULE_NAMES = tuple(name for name, schedule in SCHEDULES.items() if schedule.source == "ComfyUI")


def ksampler_sigmas(scheduler: str, sampler: str, steps: int, shift: float, strength: float) -> np.ndarray:
    """The sigmas of KSampler; `strength` is its denoise. Empty for a denoise of 0."""
    if strength <= 0:
        return np.empty(0, np.float32)
    _check_steps(steps, strength)
    return denoise_sigmas(scheduler, steps, shift, strength, spare_step=SAMPLERS[sampler].spare_step)


def scheduler_sigmas(scheduler: str, steps: int, shift: float, strength: float) -> np.ndarray:
    """The sigmas of BasicScheduler, which knows no sampler: the last `steps + 1` of the schedule."""
    if strength <= 0:
        return np.empty(0, np.float32)
    _check_steps(steps, strength)
    total = steps if strength >= 1 else int(steps / strength)
    return schedule_sigmas(scheduler, total, shift)[-(steps + 1) :]


def _check_steps(steps: int, strength: float) -> None:
    """Raise WorkflowError for a schedule of so many steps that its sigmas alone take seconds."""
    if steps / strength > MAX_STEPS:
        raise WorkflowError(
            f"denoise: expected at most {MAX_STEPS} steps in the whole schedule, got {steps} / {strength:g}"
        )


def noise_of(noise: Noise, latent: Latent) -> np.ndarray:
    """The noise of a latent's batch, float32 like its samples: stretches of one stream of the seed."""
    samples = latent.samples
    if noise.seed is None:
        return np.zeros_like(samples)
    if latent.batch_index is None:
        return randn(noise.seed, list(samples.shape))
    # One after another up to the last place that is needed.
    whole = randn(noise.seed, [max(latent.batch_index) + 1, *samples.shape[1:]])
    return np.ascontiguousarray(whole[list(latent.batch_index)])


def sample(
    engine: Engine,
    guider: Guider,
    noise: Noise,
    sampler: str,
    sigmas: np.ndarray,
    latent: Latent,
    seed: int,
    callback: Callback | None = None,
    control: Control | None = None,
) -> Latent:
    """Run a sampler over a latent.

    Args:
        engine: the model's.
        guider: the model and its prompts.
        noise: what the first latents are mixed with.
        sampler, sigmas: the loop.
        latent: the input; its mask and batch index stay with the result.
        seed: of the noise between steps.
        callback: see `Engine.denoise`.
        control: the ControlNet's input, or None.

    Raises:
        WorkflowError: the bundle does not serve the latents. Cancelled: the callback returned False.
    """
    if len(sigmas) < 2:
        return latent
    check_size(engine, latent)
    if not sigmas[-1] < 1:
        raise WorkflowError(
            f"sigmas: expected the last one below 1, where an image is left, got {sigmas[-1]:g}; a flipped schedule "
            "leads back to noise, which this model's latents cannot be scaled from"
        )
    samples, first = latent.samples, sigmas[0]
    drawn = noise_of(noise, latent)
    # ComfyUI does not evaluate the negative prompt at a cfg this close to 1.
    guided = guider.negative is not None and not math.isclose(guider.cfg, 1.0)
    request = DenoiseRequest(
        latents=first * drawn + (np.float32(1) - first) * samples,
        prompts=guider.positive.prompts,
        negatives=(guider.negative or guider.positive).prompts,
        sigmas=sigmas,
        sampler=sampler,
        shift=guider.model.shift,
        seed=seed,
        guidance_scale=guider.cfg - 1 if guided else 0.0,
        cfg_norm=guider.model.cfg_norm,
        timestep_multiplier=guider.model.timestep_multiplier,
        control=control,
        mask=None if latent.mask is None else _latent_mask(latent, drawn, sampler, seed),
        loras=dict(guider.model.loras),
    )
    result = engine.denoise(request, callback=callback)
    # ComfyUI scales what still has noise, so that the next sampler can begin with it as with an image.
    return dataclasses.replace(latent, samples=result / (np.float32(1) - sigmas[-1]))


def check_size(engine: Engine, latent: Latent) -> None:
    """Raise WorkflowError for latents of a size that the bundle does not serve."""
    shapes = engine.manifest.shapes
    height, width = (side * engine.manifest.pipeline.vae_scale_factor for side in latent.samples.shape[2:])
    for name, size, served in (("height", height, shapes.height), ("width", width, shapes.width)):
        if not served.min <= size <= served.max or size % served.multiple:
            raise WorkflowError(
                f"latent_image: expected a {name} of {served.min} to {served.max} pixels in steps of "
                f"{served.multiple}, got {size}"
            )


def _latent_mask(latent: Latent, noise: np.ndarray, sampler: str, seed: int) -> Inpaint:
    assert latent.mask is not None
    if sampler == "ddim":
        # ComfyUI keeps the image under other noise than the loop begins with, for this sampler alone.
        noise = randn((seed + 1) % 2**64, list(latent.samples.shape))
    batch, _, height, width = latent.samples.shape
    mask = resize(latent.mask[:, None], height, width, "bilinear")
    return Inpaint(repeated(mask, batch), latent.samples, noise)
