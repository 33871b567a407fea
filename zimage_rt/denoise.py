"""One run of the sampler loop over given arrays: what a workflow's sampler node does, between its other nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ._core import sample as sample_on_host
from .backends.base import Conditioning, Guidance, Inpaint, OnStep, Pipeline, SampleJob
from .backends.modules import ModuleDenoiser
from .errors import Cancelled
from .not_finite import check_finite
from .prompts import PromptEncoder
from .sampling.samplers import sampler_table, step_noise


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt for the transformer.

    Attributes:
        text: the prompt.
        is_zeroed: whether zeros replace the text encoder's output, as ComfyUI's ConditioningZeroOut does. That is not
            the empty prompt: there are as many zeros as the prompt would have numbers.
    """

    text: str
    is_zeroed: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class DenoiseRequest:
    """One run of the sampler loop.

    Attributes:
        latents: float32 `[batch, 16, latent_height, latent_width]` at the noise level `sigmas[0]`.
        prompt, negative: of every sample. The negative one is not used without guidance.
        sigmas: float32, falling.
        sampler: a name of `samplers.SAMPLERS`.
        shift: the schedule's timestep shift, which some samplers use.
        seed: of the noise between steps.
        guidance_scale: diffusers' scale: ComfyUI's cfg less 1.
        mask: the image and the mask of what is kept, which may be soft, or None; see `MaskedDenoiser`.
        loras: see `GenerateRequest.loras`.
    """

    latents: np.ndarray
    prompt: Prompt
    negative: Prompt
    sigmas: np.ndarray
    sampler: str
    shift: float
    seed: int
    guidance_scale: float = 0.0
    mask: Inpaint | None = None
    loras: Mapping[str, float] | None = None


class MaskedDenoiser:
    """A denoiser whose evaluations see and keep the image outside of a mask, as ComfyUI's noise masks do.

    Before an evaluation the latents outside of the mask are the image's at that noise level; after it the clean image
    there is the image itself. What the sampler gets is the prediction that leads to that clean image.

    Args:
        inner: the denoiser of the whole latents.
        masked: the mask, the image and its noise.
    """

    def __init__(self, inner: ModuleDenoiser, masked: Inpaint) -> None:
        self._inner, self._masked = inner, masked

    def __call__(self, latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        """One function evaluation; see `Denoiser` in csrc/cpu/sampler.h."""
        mask, image, noise = self._masked.mask, self._masked.image, self._masked.noise
        sigma = np.float32(1) - np.float32(timestep)
        kept = sigma * noise + (np.float32(1) - sigma) * image
        seen = latents * mask + kept * (np.float32(1) - mask)
        self._inner(np.ascontiguousarray(seen), timestep, guided, noise_pred)
        # Guidance is linear, so that both of its predictions may be changed before it.
        for rows in range(0, len(noise_pred), len(latents)):
            part = noise_pred[rows : rows + len(latents)]
            clean = (seen - sigma * part) * mask + image * (np.float32(1) - mask)
            part[:] = (latents - clean) / sigma


def denoise(
    request: DenoiseRequest, prompts: PromptEncoder, pipeline: Pipeline, on_step: OnStep | None = None
) -> np.ndarray:
    """Run the loop: the latents at the noise level `sigmas[-1]`. Raises Cancelled if `on_step` returned False."""
    latents = np.array(request.latents, np.float32, order="C")
    batch, shape = len(latents), latents.shape[1:]
    steps = sampler_table(request.sampler, request.sigmas, request.shift)
    seeds = (request.seed,) * batch
    texts = (request.prompt, request.negative) if request.guidance_scale else (request.prompt,)
    contexts = [prompts.zeroed(each.text) if each.is_zeroed else prompts.encode(each.text) for each in texts]
    job = SampleJob(
        latents=latents,
        conditioning=Conditioning([contexts[0]] * batch, [contexts[1]] * batch if request.guidance_scale else ()),
        steps=steps,
        guidance=Guidance(np.full((len(steps), batch), request.guidance_scale, np.float32)),
        step_noise=step_noise(request.sampler, request.sigmas, request.shift, seeds, shape, joint=True),
        on_step=on_step,
    )
    if not _run(job, pipeline, request.mask):
        raise Cancelled("the callback asked to stop; no image was made")
    return latents


def _run(job: SampleJob, pipeline: Pipeline, masked: Inpaint | None) -> bool:
    if masked is None:
        return pipeline.sample(job)
    # On the host, with any backend's evaluations: a loop on a device blends after its steps, as diffusers does.
    inner = ModuleDenoiser("transformer", pipeline.module("transformer"), job.conditioning)
    finished = sample_on_host(MaskedDenoiser(inner, masked), job)
    check_finite(job.latents, "transformer")
    return finished
