"""One run of the sampler loop over given arrays: what a workflow's sampler node does, between its other nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ._core import sample as sample_on_host
from .backends.base import Conditioning, Control, Guidance, Inpaint, OnStep, Pipeline, SampleJob
from .backends.modules import ModuleDenoiser
from .bundle.modules import denoiser as denoiser_name
from .errors import Cancelled
from .not_finite import check_finite
from .prompts import PromptEncoder
from .sampling.samplers import sampler_table, step_noise

# (latents, timestep, guided, noise_pred): one function evaluation; see `Denoiser` in csrc/cpu/sampler.h.
Denoiser = Callable[[np.ndarray, float, bool, np.ndarray], None]


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


@dataclasses.dataclass(frozen=True)
class CfgNorm:
    """What ComfyUI's CFGNorm nodes do to guided predictions. Norms are of a position's channels.

    Attributes:
        before: the strength of scaling the guided prediction to the positive one's norm, or None. 0 leaves it as it is.
        after: strengths. Each scales the clean image down to the norm of the positive prompt's, then by itself.
    """

    before: float | None = None
    after: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class DenoiseRequest:
    """One run of the sampler loop.

    Attributes:
        latents: float32 `[batch, 16, latent_height, latent_width]` at the noise level `sigmas[0]`.
        prompts, negatives: of every sample; the mean of their predictions counts. Negative ones are not used without
            guidance.
        sigmas: float32, falling.
        sampler: a name of `samplers.SAMPLERS`.
        shift: the schedule's timestep shift, which some samplers use.
        seed: of the noise between steps.
        guidance_scale: diffusers' scale: ComfyUI's cfg less 1. Down to -1, at which only the negative prompts count.
        cfg_norm: changes of guided predictions.
        timestep_multiplier: the transformer gets 1 - this * sigma as its timestep; 1 is what it was trained with.
        control: the ControlNet's input, or None.
        mask: the image and the mask of what is kept, which may be soft, or None; see `MaskedDenoiser`.
        loras: see `GenerateRequest.loras`.
    """

    latents: np.ndarray
    prompts: Sequence[Prompt]
    negatives: Sequence[Prompt]
    sigmas: np.ndarray
    sampler: str
    shift: float
    seed: int
    guidance_scale: float = 0.0
    cfg_norm: CfgNorm = CfgNorm()
    timestep_multiplier: float = 1.0
    control: Control | None = None
    mask: Inpaint | None = None
    loras: Mapping[str, float] | None = None


class CombinedDenoiser:
    """The mean of several prompts' predictions, as for ComfyUI's combined conditionings.

    Each prompt is evaluated apart, so that a batch is never larger than the request's.

    Args:
        positives, negatives: a denoiser per prompt, which is called without guidance.
    """

    def __init__(self, positives: Sequence[Denoiser], negatives: Sequence[Denoiser]) -> None:
        self._positives, self._negatives = positives, negatives

    def __call__(self, latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        """One function evaluation; see `Denoiser`."""
        batch, one = len(latents), np.empty_like(latents)
        for first, denoisers in ((0, self._positives), (batch, self._negatives if guided else ())):
            part = noise_pred[first : first + batch]
            part[:] = 0
            for each in denoisers:
                each(latents, timestep, False, one)
                part += one
            part /= np.float32(max(len(denoisers), 1))


class TimestepMultiplier:
    """A denoiser whose transformer gets `1 - multiplier * sigma` as its timestep.

    Args:
        inner: the denoiser.
        multiplier: ComfyUI's ModelSamplingSD3 has 1000.
        sigmas: float32, of all evaluations. The timestep alone would not do: 1 - sigma has lost the last digits of a
            small sigma, which the multiplier makes large.
    """

    def __init__(self, inner: Denoiser, multiplier: float, sigmas: np.ndarray) -> None:
        one, factor = np.float32(1), np.float32(multiplier)
        self._inner = inner
        self._timesteps = {float(one - sigma): float(one - factor * sigma) for sigma in sigmas}

    def __call__(self, latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        """One function evaluation; see `Denoiser`."""
        self._inner(latents, self._timesteps[timestep], guided, noise_pred)


class GuidedDenoiser:
    """A denoiser with guidance of its own: below a cfg of 1, and with norms, which the loop's guidance does not know.

    Args:
        inner: the denoiser of both predictions.
        cfg: ComfyUI's; at 1 the negative prompt is not evaluated.
        norm: changes of the guided prediction.
    """

    def __init__(self, inner: Denoiser, cfg: float, norm: CfgNorm) -> None:
        self._inner, self._cfg, self._norm = inner, cfg, norm

    def __call__(self, latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        """One function evaluation; see `Denoiser`. The loop asks for the guided prediction with `guided` false."""
        batch, is_guided = len(latents), self._cfg != 1
        both = np.empty((batch * (1 + is_guided), *latents.shape[1:]), np.float32)
        self._inner(latents, timestep, is_guided, both)
        positive = result = both[:batch]
        if is_guided:
            negative = both[batch:]
            result = negative + np.float32(self._cfg) * (positive - negative)
            if self._norm.before is not None:
                result = _scaled(result, positive, self._norm.before)
        if self._norm.after:
            sigma = np.float32(1) - np.float32(timestep)
            clean, of_positive = latents - sigma * result, latents - sigma * positive
            for strength in self._norm.after:
                share = np.minimum(_norm(of_positive) / (_norm(clean) + np.float32(1e-8)), np.float32(1))
                clean = clean * share * np.float32(strength)
            result = (latents - clean) / sigma
        noise_pred[:] = result


def _scaled(guided: np.ndarray, positive: np.ndarray, strength: float) -> np.ndarray:
    """A guided prediction with the positive one's norm, mixed with what it was for a strength other than 1."""
    norm = _norm(guided)
    scaled = guided * np.where(norm > 0, _norm(positive) / np.maximum(norm, np.float32(1e-12)), np.float32(1))
    return np.float32(strength) * scaled + np.float32(1 - strength) * guided


def _norm(values: np.ndarray) -> np.ndarray:
    """The norm of each position's channels: `[batch, channels, …]` → `[batch, 1, …]`."""
    return np.linalg.norm(values, axis=1, keepdims=True)


class MaskedDenoiser:
    """A denoiser whose evaluations see and keep the image outside of a mask, as ComfyUI's noise masks do.

    Before an evaluation the latents outside of the mask are the image's at that noise level; after it the clean image
    there is the image itself. What the sampler gets is the prediction that leads to that clean image.

    Args:
        inner: the denoiser of the whole latents.
        masked: the mask, the image and its noise.
    """

    def __init__(self, inner: Denoiser, masked: Inpaint) -> None:
        self._inner, self._masked = inner, masked

    def __call__(self, latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        """One function evaluation; see `Denoiser`."""
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
    positives, negatives = (
        [prompts.zeroed(each.text) if each.is_zeroed else prompts.encode(each.text) for each in texts]
        for texts in (request.prompts, request.negatives if request.guidance_scale else ())
    )
    guides_itself = request.guidance_scale < 0 or request.cfg_norm != CfgNorm()
    scale = 0.0 if guides_itself else request.guidance_scale
    job = SampleJob(
        latents=latents,
        conditioning=Conditioning(positives[:1] * batch, negatives[:1] * batch, request.control),
        steps=steps,
        guidance=Guidance(np.full((len(steps), batch), scale, np.float32)),
        step_noise=step_noise(
            request.sampler, request.sigmas, request.shift, (request.seed,) * batch, shape, joint=True
        ),
        on_step=on_step,
    )
    is_one_each = len(positives) == 1 and len(negatives) <= 1
    if is_one_each and not guides_itself and request.timestep_multiplier == 1 and request.mask is None:
        finished = pipeline.sample(job)
    else:
        # On the host, with any backend's evaluations: a loop on a device knows nothing of these.
        name = denoiser_name(request.control is not None)
        finished = sample_on_host(_denoiser(request, positives, negatives, job, pipeline), job)
        check_finite(latents, name)
    if not finished:
        raise Cancelled("the callback asked to stop; no image was made")
    return latents


def _denoiser(
    request: DenoiseRequest,
    positives: Sequence[np.ndarray],
    negatives: Sequence[np.ndarray],
    job: SampleJob,
    pipeline: Pipeline,
) -> Denoiser:
    """The denoiser of a loop on the host: the transformer with what the request asks for around it."""
    name = denoiser_name(request.control is not None)
    module = pipeline.module(name)

    def apart(contexts: Sequence[np.ndarray]) -> list[Denoiser]:
        batch = len(job.latents)
        return [ModuleDenoiser(name, module, Conditioning([each] * batch, (), request.control)) for each in contexts]

    inner: Denoiser = ModuleDenoiser(name, module, job.conditioning)
    if len(positives) > 1 or len(negatives) > 1:
        inner = CombinedDenoiser(apart(positives), apart(negatives))
    if request.timestep_multiplier != 1:
        inner = TimestepMultiplier(inner, request.timestep_multiplier, job.steps[:, 0])
    if request.guidance_scale < 0 or request.cfg_norm != CfgNorm():
        inner = GuidedDenoiser(inner, request.guidance_scale + 1, request.cfg_norm)
    if request.mask is not None:
        inner = MaskedDenoiser(inner, request.mask)
    return inner
