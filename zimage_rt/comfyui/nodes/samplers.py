"""Samplers, and the parts that custom ones are made of."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Choice, Text, Whole
from ..registry import node
from ..run import Run
from ..sampling import ksampler_sigmas, sample, scheduler_sigmas
from ..values import Guider, Latent, Noise
from .model_patches import control_of
from .sockets import (
    Cfg,
    ConditioningIn,
    GuiderIn,
    LatentIn,
    ModelIn,
    NoiseIn,
    SamplerIn,
    SamplerName,
    SchedulerName,
    Seed,
    Share,
    SigmasIn,
    Steps,
    YesNo,
)

Switch = Annotated[str, Choice(("enable", "disable"))]
Step = Annotated[int, Whole(0, 10_000)]


@node("KSampler", "LATENT", category="sampling")
def ksampler(
    run: Run,
    model: ModelIn,
    seed: Seed,
    steps: Steps,
    cfg: Cfg,
    sampler_name: SamplerName,
    scheduler: SchedulerName,
    positive: ConditioningIn,
    negative: ConditioningIn,
    latent_image: LatentIn,
    denoise: Share = 1.0,
) -> tuple[Any, ...]:
    """Noise on a latent, and the loop over it."""
    sigmas = ksampler_sigmas(scheduler, sampler_name, steps, model.shift, denoise)
    guider = Guider(model, positive, negative, cfg)
    return (_sampled(run, guider, Noise(seed), sampler_name, sigmas, latent_image, seed),)


@node("KSamplerAdvanced", "LATENT", category="sampling")
def ksampler_advanced(
    run: Run,
    model: ModelIn,
    add_noise: Switch,
    noise_seed: Seed,
    steps: Steps,
    cfg: Cfg,
    sampler_name: SamplerName,
    scheduler: SchedulerName,
    positive: ConditioningIn,
    negative: ConditioningIn,
    latent_image: LatentIn,
    start_at_step: Step,
    end_at_step: Step,
    return_with_leftover_noise: Switch,
) -> tuple[Any, ...]:
    """A part of a schedule, which may begin without noise and may leave some."""
    sigmas = ksampler_sigmas(scheduler, sampler_name, steps, model.shift, 1.0)
    if end_at_step < len(sigmas) - 1:
        sigmas = sigmas[: end_at_step + 1].copy()
        if return_with_leftover_noise == "disable":
            sigmas[-1] = 0
    if start_at_step >= len(sigmas) - 1:
        return (latent_image,)
    guider = Guider(model, positive, negative, cfg)
    noise = Noise(noise_seed if add_noise == "enable" else None)
    return (_sampled(run, guider, noise, sampler_name, sigmas[start_at_step:], latent_image, noise_seed),)


@node("RandomNoise", "NOISE", category="sampling/custom_sampling/noise")
def random_noise(run: Run, noise_seed: Seed) -> tuple[Any, ...]:
    """The noise of a seed."""
    del run
    return (Noise(noise_seed),)


@node("DisableNoise", "NOISE", category="sampling/custom_sampling/noise")
def disable_noise(run: Run) -> tuple[Any, ...]:
    """No noise."""
    del run
    return (Noise(None),)


@node("KSamplerSelect", "SAMPLER", category="sampling/custom_sampling/samplers")
def select_sampler(run: Run, sampler_name: SamplerName) -> tuple[Any, ...]:
    """A sampler by its name."""
    del run
    return (sampler_name,)


@node("BasicScheduler", "SIGMAS", category="sampling/custom_sampling/schedulers")
def basic_scheduler(
    run: Run, model: ModelIn, scheduler: SchedulerName, steps: Steps, denoise: Share
) -> tuple[Any, ...]:
    """A model's sigmas."""
    del run
    return (scheduler_sigmas(scheduler, steps, model.shift, denoise),)


@node("ManualSigmas", "SIGMAS", category="sampling/custom_sampling/schedulers")
def manual_sigmas(run: Run, sigmas: Annotated[str, Text()]) -> tuple[Any, ...]:
    """The numbers of a text."""
    del run
    found = [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)(?:[eE][-+]?\d+)?", sigmas)]
    falls = all(before > after for before, after in itertools.pairwise(found))
    if len(found) < 2 or not all(math.isfinite(each) and 0 <= each <= 1 for each in found) or not falls:
        raise WorkflowError(f"sigmas: expected two or more numbers that fall from at most 1, got {sigmas[:80]!r}")
    return (np.array(found, np.float32),)


@node("BasicGuider", "GUIDER", category="sampling/custom_sampling/guiders")
def basic_guider(run: Run, model: ModelIn, conditioning: ConditioningIn) -> tuple[Any, ...]:
    """A model without guidance."""
    del run
    return (Guider(model, conditioning, None, 1.0),)


@node("CFGGuider", "GUIDER", category="sampling/custom_sampling/guiders")
def cfg_guider(
    run: Run, model: ModelIn, positive: ConditioningIn, negative: ConditioningIn, cfg: Cfg
) -> tuple[Any, ...]:
    """A model with guidance."""
    del run
    return (Guider(model, positive, negative, cfg),)


@node("SamplerCustom", "LATENT", "LATENT", category="sampling/custom_sampling")
def sampler_custom(
    run: Run,
    model: ModelIn,
    add_noise: YesNo,
    noise_seed: Seed,
    cfg: Cfg,
    positive: ConditioningIn,
    negative: ConditioningIn,
    sampler: SamplerIn,
    sigmas: SigmasIn,
    latent_image: LatentIn,
) -> tuple[Any, ...]:
    """The loop over given sigmas."""
    guider = Guider(model, positive, negative, cfg)
    noise = Noise(noise_seed if add_noise else None)
    drawn = _sampled(run, guider, noise, sampler, sigmas, latent_image, noise_seed)
    return drawn, drawn


@node("SamplerCustomAdvanced", "LATENT", "LATENT", category="sampling/custom_sampling")
def sampler_custom_advanced(
    run: Run, noise: NoiseIn, guider: GuiderIn, sampler: SamplerIn, sigmas: SigmasIn, latent_image: LatentIn
) -> tuple[Any, ...]:
    """The loop over given sigmas, with everything given."""
    drawn = _sampled(run, guider, noise, sampler, sigmas, latent_image, noise.seed or 0)
    return drawn, drawn


def _sampled(
    run: Run, guider: Guider, noise: Noise, sampler: str, sigmas: np.ndarray, latent: Latent, seed: int
) -> Latent:
    clips = (guider.positive.clip, (guider.negative or guider.positive).clip)
    bundles = {run.together("text_encoder", guider.model.bundle, clip.bundle) for clip in clips}
    if len(bundles) > 1:
        raise WorkflowError(f"positive and negative: expected one text encoder, got those of {' and '.join(bundles)}")
    guider = dataclasses.replace(guider, model=dataclasses.replace(guider.model, bundle=bundles.pop()))
    run.events.samples(run.node, latent.samples.shape, len(sigmas) - 1)
    control = control_of(run, guider.model, latent) if len(sigmas) > 1 else None
    engine = run.model_engine(guider.model)
    return sample(engine, guider, noise, sampler, sigmas, latent, seed, run.on_step, control)
