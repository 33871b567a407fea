"""The request: every field with its unit, range and default. `resolve.py` checks a request against a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..sampling.samplers import DEFAULT_SAMPLER
from ..sampling.schedules import DEFAULT_SCHEDULE

# The noise of a batch: each image's from its own seed, or all from one stream of the first seed.
BATCH_NOISE = ("separate", "comfyui")


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """The argument of a callback, which is called after each step.

    Attributes:
        step, num_steps: the step's number, from 0, and the number of steps.
        sigma, sigma_next: noise level before and after the step.
        stage: 0, or 1 in the second pass.
        read_latents: returns `latents`; call it, like `preview`, before the callback returns.
        preview: decodes the latents with the tiny VAE to uint8 images `[batch, height, width, 3]`.
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


# Returns False to cancel; any other value, None included, continues.
Callback = Callable[[StepInfo], bool | None]


@dataclasses.dataclass(frozen=True)
class SecondPass:
    """Image-to-image over the result of the first pass: larger for detail, or at the same size to refine it.

    Attributes:
        scale: factor of height and width, e.g. 2.0; 1.0 refines. The size is rounded to what the bundle serves.
        strength: the part of the schedule that is run, as in image-to-image: above 1 - 1/N with N steps, nothing of
            the first pass is left.
        method: `pixel` decodes, resizes the image and encodes it; `latent` resizes the latents, which is faster and
            needs more strength.
        num_inference_steps: steps of the whole schedule, of which strength is a part; None takes the first pass's.
        denoise: ComfyUI's measure in place of strength: see `GenerateRequest.denoise`.
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
        negative_prompt: what to steer away from; one for all prompts, or one per prompt. Without `guidance_scale` > 0
            it has no effect, and a RequestWarning says so.
        height, width: pixels.
        num_inference_steps: function evaluations (guided ones count once).
        guidance_scale: 0 means no guidance; `pred = pos + scale * (pos - neg)` as in diffusers.
        cfg_truncation: evaluations at which 1 - sigma exceeds this are not guided.
        cfg_normalization: > 0 limits the guided prediction's norm to that multiple of the positive one's.
        dynamic_cfg: 0 to 1, how much the scale depends on the prompt's length and the step; `sampling/guidance.py` has
            the formula.
        seed: the first image's (image i gets seed + i), or one per image; random if None, and reported in the result.
        num_images: images per prompt.
        vae: `tiny` or `full`; the default is the bundle's (`Manifest.default_vae`).
        latents: start from these, float32 `[batch, 16, height / 8, width / 8]`, instead of the seed's noise.
        sampler: a name of `samplers.SAMPLERS`; plain ones give ComfyUI's numbers, `diffusers_…` diffusers'.
        schedule: a name of `schedules.SCHEDULES`, named likewise; the default is Z-Image's own.
        sigmas: custom sigmas, falling from at most 1, before the checkpoint's shift and without the last 0.
        image: the image to begin from: a `PIL.Image`, a path, or an array `[height, width, 3]` (or with 1, 4 or no
            channels) of uint8, uint16 from 0 to 65535, floats from 0 to 1, or bool. 16-bit grey is read by its range;
            a `PIL.Image` without a known range (mode `I` or `F`) is refused. Its size, cut to what the bundle serves,
            is the default of `height` and `width`.
        image_latents: the image as latents, float32 `[batch, 16, height / 8, width / 8]`, such as
            `GenerateResult.latents`; nothing is encoded.
        strength: the part of the schedule that is run on `image`: 0.3 retouches it, 1 ignores it. Above 1 - 1/N with N
            steps (0.875 with 8) it is ignored too, as in diffusers: all steps are run, from noise alone. A
            RequestWarning says so if the strength is less than 1.
        mask: white marks the part of `image` to draw, black the part to preserve to the byte. It has the aspect ratio
            of the image, after EXIF orientation, at any size, and is fitted with it.
        mask_feather: width of the mask's soft edge, in pixels.
        fit: how an image of another aspect ratio, and its mask, is fitted: `crop`, `pad` or `stretch`.
        control_image: the ControlNet's input (edges, depth, a pose), given and fitted as `image` is; the bundle must
            have been exported with a ControlNet. Its size is used if nothing else gives one.
        control_scale: diffusers' `controlnet_conditioning_scale`; 0 disables the control image.
        second_pass: a second pass over the result, see `SecondPass`; `height` and `width` are the first pass's.
        vae_tile: decode in tiles of this many pixels, for sizes that do not fit in memory whole.
        shift: the schedule's timestep shift, more than 0; None takes the bundle's (3.0 for Z-Image-Turbo).
        denoise: ComfyUI's measure in place of `strength`: the last `num_inference_steps` of a schedule of
            int(num_inference_steps / denoise) steps are run, and all of them are evaluated.
        batch_noise: `separate`: image i of a batch is drawn from its own seed and can be repeated alone; `comfyui`: the
            batch's noise is one stream of one seed, so that image i > 0 needs the whole batch.
        fit_size: `exact` refuses a height or width that is no multiple of what the bundle serves; `nearest` takes the
            nearest multiple, the smaller of two.
        truncate_prompt: cut prompts that are longer than the bundle serves, as diffusers does: at the end, including
            the chat template's last tokens. The record's `warnings` say so.
        literal_prompt: read markers of the chat template in prompts, such as `<|im_end|>`, as text. By default they act
            as markers, as in diffusers. Negative prompts are read in the same way.
        loras: weights of loaded LoRAs, by name, the others being 0; None takes the engine's (`Engine.set_loras`).
            Requests with the same weights run together; those with others wait.
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
    """A checked second pass: its size, its sigmas, and the control image at its size."""

    height: int
    width: int
    method: str
    sigmas: np.ndarray
    control_image: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class ResolvedRequest:
    """A request with every default filled in and every field checked; tuples have one entry per image.

    `sigmas` are those that are run. `image` and `control_image` are uint8 `[height, width, 3]`. `mask` is uint8
    `[height, width]`, 255 for pixels to draw. `warnings` has one sentence per field that has no effect.
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
