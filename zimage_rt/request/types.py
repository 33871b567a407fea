"""The request: every field with its unit, range and default. `resolve.py` checks one against a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..sampling.samplers import DEFAULT_SAMPLER
from ..sampling.schedules import DEFAULT_SCHEDULE

# Whose noise an image of a batch gets: that of its own seed, or its part of what the first seed gives for all of them.
BATCH_NOISE = ("separate", "comfyui")


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each step.

    Attributes:
        step: from 0; `num_steps` of them.
        sigma, sigma_next: noise level before and after the step.
        stage: 0, or 1 in the second pass of a request that has one.
        read_latents: returns `latents`. Call it, like `preview`, before the callback returns.
        preview: returns uint8 images `[batch, height, width, 3]` of the latents, through the tiny VAE.
    """

    step: int
    num_steps: int
    sigma: float
    sigma_next: float
    read_latents: Callable[[], np.ndarray]
    preview: Callable[[], np.ndarray]
    stage: int = 0

    @property
    def latents(self) -> np.ndarray:
        """float32 `[batch, 16, latent_height, latent_width]`, read-only, valid until the callback returns."""
        return self.read_latents()


# Returns False to cancel; anything else, None too, goes on.
Callback = Callable[[StepInfo], bool | None]


@dataclasses.dataclass(frozen=True)
class SecondPass:
    """Draw again over what was drawn: at a larger size for detail, or at the same size to refine.

    Attributes:
        scale: how much larger, e.g. 2.0; 1.0 refines. The size is rounded to what the bundle serves.
        strength: how much of the schedule is run again, as in image-to-image: above 1 - 1/N with N steps, nothing of
            the first pass is left.
        method: `pixel` decodes, resizes the picture and encodes it; `latent` resizes the latents, which is
            faster and wants more strength.
        num_inference_steps: of the schedule that strength is a part of; None takes the first pass's.
        denoise: ComfyUI's measure, in place of strength: see `GenerateRequest.denoise`.
    """

    scale: float = 2.0
    strength: float = 0.4
    method: str = "pixel"
    num_inference_steps: int | None = None
    denoise: float | None = None


SECOND_PASS_METHODS = ("pixel", "latent")


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """One request. `Engine.generate` takes the same names.

    Attributes:
        prompt: one prompt, or several for a batch.
        negative_prompt: what to steer away from; one for all prompts or one each. It needs `guidance_scale` > 0;
            without, it does nothing, and a RequestWarning says so.
        height, width: pixels.
        num_inference_steps: function evaluations (guided ones count once).
        guidance_scale: 0 means none; `pred = pos + scale * (pos - neg)` as in diffusers.
        cfg_truncation: guidance is off where 1 - sigma exceeds this.
        cfg_normalization: > 0 limits the guided prediction's norm to that multiple of the positive one's.
        dynamic_cfg: 0 to 1: how far the scale follows the prompt's length and the step; `sampling/guidance.py` has the
            formula.
        seed: one for the first image (image i gets seed + i), or one for each image; drawn at
            random if None, and reported in the result.
        num_images: images for each prompt.
        vae: `tiny` or `full`.
        latents: start from these, float32 `[batch, 16, height / 8, width / 8]`, not from the seed's noise.
        sampler: a name of `samplers.SAMPLERS`; plain ones give ComfyUI's numbers, `diffusers_…` diffusers'.
        schedule: a name of `schedule.SCHEDULES`, likewise; the default is Z-Image's own.
        sigmas: a schedule of your own, falling from at most 1, before the checkpoint's shift and without the last 0.
        image: begin from this picture: a `PIL.Image`, a path, or an array `[height, width, 3]` (also without the 3, or
            with 1 or 4): uint8, uint16 from 0 to 65535, floats from 0 to 1, or bool. 16-bit grey is read by its
            range; a `PIL.Image` without a known range (mode `I` or `F`) is refused. Its size, cut to what the bundle
            serves, is the default of `height` and `width`.
        image_latents: the same as latents, float32 `[batch, 16, height / 8, width / 8]`: what `GenerateResult.latents`
            holds, so that nothing is decoded and encoded again.
        strength: how much of the schedule is run on `image`: 0.3 retouches it, 1 ignores it. So does everything above
            1 - 1/N with N steps (0.875 with 8), as in diffusers: all steps are run then, from noise alone. A
            RequestWarning says so where it is less than 1.
        mask: what of `image` to draw anew, white, and what to keep, black; kept pixels are the image's own bytes. It
            has the shape of the image as that is seen (turned by its EXIF data), at any size, and is fitted with it.
        mask_feather: how soft the mask's edge is, in pixels.
        fit: how an image of another shape, and its mask, is fitted: `crop`, `pad` or `stretch`.
        control_image: what a ControlNet is to follow (edges, depth, a pose), given and fitted as `image` is; the bundle
            must have been exported with one. Where nothing else says a size, it is this one's.
        control_scale: how closely: diffusers' `controlnet_conditioning_scale`. 0 draws as if there were none.
        second_pass: draw once more over the result, see `SecondPass`; `height` and `width` are the first pass's.
        vae_tile: decode in tiles of this many pixels, for sizes that do not fit in memory whole.
        shift: the schedule's timestep shift, more than 0; None takes the bundle's (3.0 for Z-Image-Turbo).
        denoise: ComfyUI's measure of how far to go from `image`, in place of `strength`: of the schedule of
            int(num_inference_steps / denoise) steps the last `num_inference_steps` are run, all of them evaluated.
        batch_noise: `separate`: image i of a batch is drawn from its own seed and can be drawn alone; `comfyui`: all
            noise of the batch is one stream of the one seed, so that image i > 0 needs the whole batch.
        fit_size: `exact` refuses a height or width that is no multiple of what the bundle serves; `nearest` takes the
            nearest that is, the smaller of two.
        truncate_prompt: cut prompts that are longer than the bundle serves, as diffusers does: the end, with the chat
            template's last tokens. The record's `warnings` say so.
        literal_prompt: take markers of the chat template in prompts, such as `<|im_end|>`, as text; without, they act
            as markers, as in diffusers. It holds for negative prompts, too.
        loras: weights by name of the loaded LoRAs to draw with, the others being off; None takes the engine's
            (`Engine.set_loras`). Requests with the same weights run together; a change waits for those that run.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    cfg_truncation: float = 1.0
    cfg_normalization: float = 0.0
    dynamic_cfg: float = 0.0
    seed: int | Sequence[int] | None = None
    num_images: int = 1
    vae: str | None = None
    latents: np.ndarray | None = None
    sampler: str = DEFAULT_SAMPLER
    schedule: str = DEFAULT_SCHEDULE
    sigmas: Sequence[float] | None = None
    image: Any = None
    image_latents: np.ndarray | None = None
    strength: float = 0.6
    mask: Any = None
    mask_feather: float = 0.0
    fit: str = "crop"
    control_image: Any = None
    control_scale: float = 0.75
    second_pass: SecondPass | None = None
    vae_tile: int | None = None
    shift: float | None = None
    denoise: float | None = None
    batch_noise: str = "separate"
    fit_size: str = "exact"
    truncate_prompt: bool = False
    literal_prompt: bool = False
    loras: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class ResolvedSecondPass:
    """A second pass with its size and its sigmas, and the control image at that size."""

    height: int
    width: int
    method: str
    sigmas: np.ndarray
    control_image: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class ResolvedRequest:
    """A request with every default filled in and every field checked; tuples have one entry per image.

    `sigmas` are those that are run; `image` and `control_image` are uint8 `[height, width, 3]`, `mask` is uint8
    `[height, width]`, 255 where to draw. `warnings` name the fields that have no effect, one sentence each.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    sampler: str
    sigmas: np.ndarray
    guidance_scale: float
    cfg_truncation: float
    cfg_normalization: float
    dynamic_cfg: float
    vae: str
    latents: np.ndarray | None
    image: np.ndarray | None
    image_latents: np.ndarray | None
    mask: np.ndarray | None
    control_image: np.ndarray | None
    control_scale: float
    second_pass: ResolvedSecondPass | None
    vae_tile: int | None
    shift: float
    batch_noise: str
    truncate_prompt: bool
    literal_prompt: bool
    loras: dict[str, float] | None
    warnings: tuple[str, ...] = ()
