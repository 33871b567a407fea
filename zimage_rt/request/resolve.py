"""Checks a request against a bundle before any work is done, and fills in its defaults."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks, limits
from ..bundle.manifest import Manifest
from ..bundle.modules import VAES, vae_decoder, vae_encoder
from ..bundle.tokenizer import check_prompt
from ..errors import RequestError
from ..image.convert import read_image
from ..sampling.noise import MAX_SEED
from ..sampling.samplers import SAMPLERS
from .images import fit_pixels, image_and_mask, read_control_image, side
from .schedule import ScheduleFields, resolve_sigmas
from .types import BATCH_NOISE, SECOND_PASS_METHODS, GenerateRequest, ResolvedRequest, ResolvedSecondPass, SecondPass
from .warnings_of import without_effect

if TYPE_CHECKING:
    from PIL.Image import Image

_LATENTS = "float32 [batch, 16, height / 8, width / 8]"


@dataclasses.dataclass(frozen=True, eq=False)
class _Inputs:
    """The images and latents of a request as they were given, before they are fitted to its size.

    Attributes:
        latents, image_latents: arrays whose shapes are not checked yet, or None.
        image, control_image: decoded images at their own size, or None.
    """

    latents: np.ndarray | None
    image_latents: np.ndarray | None
    image: Image | None
    control_image: Image | None

    @property
    def has_start(self) -> bool:
        """Whether there is an image or latents to begin from."""
        return self.image is not None or self.latents is not None or self.image_latents is not None


def resolve(request: GenerateRequest, manifest: Manifest) -> ResolvedRequest:
    """Check a request against what the bundle serves, and fill in the defaults. Raises RequestError."""
    if not isinstance(request, GenerateRequest):
        raise RequestError(f"request: expected a GenerateRequest, got {type(request).__name__}")
    prompts, negatives, num_images = _prompts(request, manifest)
    notes: list[str] = []
    guidance = _guidance_scale(request, manifest)
    vae = resolve_vae(request.vae, manifest)
    inputs = _read_inputs(request, manifest, notes)
    _check_not_empty(prompts, inputs, guidance)
    height, width = _size(request, manifest, inputs)
    _check_image_latents(request, inputs)
    image, mask = image_and_mask(request, inputs.image, height, width, notes)
    shift = _shift(request, manifest)
    second_pass = _second_pass(request, manifest, shift, height, width, inputs.control_image)
    encodes_image = image is not None or (second_pass is not None and second_pass.method == "pixel")
    _check_vae_encoder(manifest, vae, encodes_image, inputs.control_image is not None)
    batch = len(prompts) * num_images
    factor = manifest.pipeline.vae_scale_factor
    shape = (batch, manifest.pipeline.latent_channels, height // factor, width // factor)
    batch_noise = checks.choice(request.batch_noise, "batch_noise", BATCH_NOISE)
    resolved = ResolvedRequest(
        prompts=tuple(prompt for prompt in prompts for _ in range(num_images)),
        negative_prompts=tuple(text for text in negatives for _ in range(num_images)),
        seeds=_seeds(request.seed, batch, joint=batch_noise == "comfyui"),
        height=height,
        width=width,
        sampler=checks.choice(request.sampler, "sampler", SAMPLERS),
        sigmas=_sigmas(request, manifest, shift, begins=image is not None or inputs.image_latents is not None),
        guidance_scale=guidance,
        cfg_truncation=checks.number(request.cfg_truncation, "cfg_truncation"),
        cfg_normalization=checks.number(request.cfg_normalization, "cfg_normalization", limits.MAX_GUIDANCE),
        dynamic_cfg=checks.number(request.dynamic_cfg, "dynamic_cfg", 1.0),
        vae=vae,
        latents=_latents(inputs.latents, shape, "latents"),
        image=image,
        image_latents=_latents(inputs.image_latents, shape, "image_latents"),
        mask=mask,
        control_image=_control_image(inputs.control_image, width, height, request.fit),
        control_scale=checks.number(request.control_scale, "control_scale", limits.MAX_CONTROL_SCALE),
        second_pass=second_pass,
        vae_tile=resolve_tile(request.vae_tile, manifest),
        shift=shift,
        batch_noise=batch_noise,
        truncate_prompt=checks.flag(request.truncate_prompt, "truncate_prompt"),
        literal_prompt=checks.flag(request.literal_prompt, "literal_prompt"),
        loras=_loras(request.loras),
    )
    checks.number(request.strength, "strength", 1.0)
    return dataclasses.replace(resolved, warnings=(*notes, *without_effect(request, resolved)))


def _guidance_scale(request: GenerateRequest, manifest: Manifest) -> float:
    """The request's guidance scale, or the bundle's own."""
    value = manifest.pipeline.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return checks.number(value, "guidance_scale", limits.MAX_GUIDANCE)


def _read_inputs(request: GenerateRequest, manifest: Manifest, notes: list[str]) -> _Inputs:
    """Read the images and latents of a request; `notes` gets a sentence per image file that is not used whole."""
    latents = None if request.latents is None else checks.array(request.latents, "latents", _LATENTS)
    image_latents = None
    if request.image_latents is not None:
        image_latents = checks.array(request.image_latents, "image_latents", _LATENTS)
    image = None if request.image is None else read_image(request.image, "image", notes)
    return _Inputs(latents, image_latents, image, read_control_image(request, manifest, notes))


def _check_not_empty(prompts: Sequence[str], inputs: _Inputs, guidance: float) -> None:
    """Raise RequestError for an empty prompt with nothing else to draw from.

    With guidance or an image an empty prompt has a meaning, as in diffusers and ComfyUI: the image is drawn freely.
    """
    if inputs.has_start or inputs.control_image is not None or guidance > 0:
        return
    if not all(prompt.strip() for prompt in prompts):
        raise RequestError(
            "prompt: expected some text, got an empty one; say what to draw, or give an image or a guidance_scale of "
            "more than 0, with which an empty prompt has a meaning"
        )


def _size(request: GenerateRequest, manifest: Manifest, inputs: _Inputs) -> tuple[int, int]:
    """Height and width in pixels; the control image gives them if nothing else does."""
    image = inputs.image if inputs.has_start else inputs.control_image
    height, width = (side(request, manifest, name, image, inputs.image_latents) for name in ("height", "width"))
    if height * width > limits.MAX_PIXELS:
        raise RequestError(
            f"height and width: expected at most {limits.MAX_PIXELS} pixels, got {height * width}", field="height"
        )
    return height, width


def _check_image_latents(request: GenerateRequest, inputs: _Inputs) -> None:
    """Raise RequestError for `image_latents` beside another start, or with a mask."""
    if inputs.image_latents is None:
        return
    if inputs.image is not None or inputs.latents is not None:
        raise RequestError("image_latents: expected it without `image` and `latents`; all three say what to begin with")
    if request.mask is not None:
        raise RequestError("mask: expected an image, whose pixels are kept; give `image`, not `image_latents`")


def _check_vae_encoder(manifest: Manifest, vae: str, encodes_image: bool, encodes_control: bool) -> None:
    """Raise RequestError if an image has to be encoded and the bundle has no encoder of that VAE."""
    if (encodes_image or encodes_control) and vae_encoder(vae) not in manifest.modules:
        name = "image" if encodes_image else "control_image"
        raise RequestError(f'{name}: this bundle has no {vae} VAE encoder; export it again with vae = ["{vae}"]')


def _sigmas(request: GenerateRequest, manifest: Manifest, shift: float, *, begins: bool) -> np.ndarray:
    """The sigmas of the first pass, float32 `[steps + 1]`; `begins` is whether it begins from an image."""
    fields = ScheduleFields(
        schedule=request.schedule,
        sampler=request.sampler,
        sigmas=request.sigmas,
        num_inference_steps=request.num_inference_steps,
        strength=request.strength,
        denoise=request.denoise,
    )
    return resolve_sigmas(fields, default_steps=manifest.pipeline.num_inference_steps, shift=shift, begins=begins)


def _prompts(request: GenerateRequest, manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """The prompts, as many negative prompts, and the number of images per prompt, which all fit into one batch."""
    allowed = manifest.shapes.batch
    most, tokens = min(allowed.max, limits.MAX_BATCH), manifest.shapes.prompt_tokens.max
    prompts = _texts(request.prompt, "prompt", most, tokens)
    if not prompts:
        raise RequestError("prompt: expected at least one, got an empty list")
    negatives = _texts(request.negative_prompt, "negative_prompt", most, tokens)
    if len(negatives) not in (1, len(prompts)):
        raise RequestError(f"negative_prompt: expected 1 or {len(prompts)}, one for each prompt, got {len(negatives)}")
    num_images = checks.integer(request.num_images, "num_images", 1, most)
    batch = len(prompts) * num_images
    if batch > most or batch not in allowed:
        raise RequestError(
            f"batch: expected at most {most} images a request, got {batch} "
            f"({len(prompts)} prompts, {num_images} each); split the request",
            field="num_images" if num_images > 1 else "prompt",
        )
    return prompts, negatives * len(prompts) if len(negatives) == 1 else negatives, num_images


def resolve_vae(vae: Any, manifest: Manifest) -> str:
    """The VAE of that name, or for None the bundle's default. Raises RequestError if the bundle does not have it."""
    if vae is None:
        vae = manifest.default_vae
    if not isinstance(vae, str) or vae not in VAES:
        raise RequestError(f"vae: expected tiny or full, got {checks.shown(vae)}")
    if vae_decoder(vae) not in manifest.modules:
        raise RequestError(f'vae: this bundle has no {vae} VAE; export it again with vae = ["{vae}"]')
    return vae


def _shift(request: GenerateRequest, manifest: Manifest) -> float:
    if request.shift is None:
        return manifest.pipeline.shift
    shift = checks.number(request.shift, "shift", limits.MAX_SHIFT)
    if shift < limits.MIN_SHIFT:
        raise RequestError(
            f"shift: expected more than 0, at which every sigma is 0: {limits.MIN_SHIFT:g} to {limits.MAX_SHIFT:g}, "
            f"got {shift:g}"
        )
    return shift


def resolve_tile(value: Any, manifest: Manifest) -> int | None:
    """The side of a tile in pixels; None stays None. Raises RequestError."""
    if value is None:
        return None
    multiple = manifest.pipeline.size_multiple
    size = checks.integer(value, "vae_tile", 8 * multiple, limits.MAX_SIDE)
    if size % multiple:
        raise RequestError(f"vae_tile: expected a multiple of {multiple}, got {size}")
    return size


def _second_pass(
    request: GenerateRequest, manifest: Manifest, shift: float, height: int, width: int, control: Image | None
) -> ResolvedSecondPass | None:
    """The second pass, checked: its size, its sigmas and the control image at its size; None if there is none."""
    second = request.second_pass
    if second is None:
        return None
    if not isinstance(second, SecondPass):
        raise RequestError(f"second_pass: expected a SecondPass, got {type(second).__name__}")
    if request.mask is not None:
        raise RequestError(
            "second_pass and mask: expected one of them; draw again over the result in a second request", field="mask"
        )
    scale = checks.number(second.scale, "second_pass.scale", limits.MAX_UPSCALE)
    sizes = []
    for name, size in (("height", height), ("width", width)):
        allowed = getattr(manifest.shapes, name)
        larger = round(size * scale / allowed.multiple) * allowed.multiple
        if larger not in allowed:
            raise RequestError(
                f"second_pass.scale: {scale:g} times {name} {size} is {larger}; this bundle serves {allowed.min} to "
                f"{allowed.max}: choose another scale or size"
            )
        sizes.append(larger)
    own = second.num_inference_steps is not None
    sigmas = resolve_sigmas(
        ScheduleFields(
            schedule=request.schedule,
            sampler=request.sampler,
            sigmas=None if own else request.sigmas,
            num_inference_steps=second.num_inference_steps if own else request.num_inference_steps,
            strength=second.strength,
            denoise=second.denoise,
        ),
        default_steps=manifest.pipeline.num_inference_steps,
        shift=shift,
        begins=True,  # with the first pass's image
        prefix="second_pass.",
    )
    method = checks.choice(second.method, "second_pass.method", SECOND_PASS_METHODS)
    # From the image as it was given, which may be larger than the first pass.
    control_image = _control_image(control, sizes[1], sizes[0], request.fit)
    return ResolvedSecondPass(sizes[0], sizes[1], method, sigmas, control_image)


def _control_image(image: Image | None, width: int, height: int, fit: str) -> np.ndarray | None:
    """The control image at a pass's size, uint8 `[height, width, 3]`."""
    return None if image is None else fit_pixels(image, width, height, fit)


def _loras(value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    return {name: checks.weight(weight, f"loras.{name}") for name, weight in checks.named(value, "loras").items()}


def _texts(value: Any, name: str, most: int, max_tokens: int) -> tuple[str, ...]:
    what = "a string or a list of strings"
    texts = (value,) if isinstance(value, str) else checks.items(value, name, what, most)
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{name}: expected {what}, got one with {checks.shown(text)}")
    return tuple(check_prompt(text, name, max_tokens) for text in texts)


def _seeds(seed: Any, batch: int, *, joint: bool) -> tuple[int, ...]:
    if seed is None:
        # 32 bits are easy to copy by hand, and the generator uses no more of a seed.
        seed = secrets.randbits(32)
    if isinstance(seed, str) or not isinstance(seed, (Sequence, np.ndarray)):
        first = checks.integer(seed, "seed", 0, MAX_SEED)
        return (first,) * batch if joint else tuple((first + i) % (MAX_SEED + 1) for i in range(batch))
    given = checks.items(seed, "seed", f"one number or {batch} of them", limits.MAX_BATCH)
    if len(given) != batch:
        raise RequestError(f"seed: expected one number or {batch} of them, got {len(given)}")
    seeds = tuple(checks.integer(item, "seed", 0, MAX_SEED) for item in given)
    if joint and len(set(seeds)) > 1:
        raise RequestError("seed: expected one for all images with batch_noise 'comfyui', got several")
    return seeds


def _latents(array: np.ndarray | None, shape: tuple[int, ...], name: str) -> np.ndarray | None:
    """The latents, if they are finite float32 of that shape; None stays None. Raises RequestError."""
    if array is None:
        return None
    if array.shape != shape:
        raise RequestError(f"{name}: expected {list(shape)}, got {list(array.shape)}")
    if array.dtype != np.float32:
        raise RequestError(f"{name}: expected finite float32 values, got {array.dtype}")
    if not np.isfinite(array).all():
        raise RequestError(f"{name}: expected finite float32 values, got values that are not finite")
    return array


def check_latents(latents: Any, manifest: Manifest) -> None:
    """Raise RequestError unless these are latents of a size that the bundle decodes; the batch may have any size."""
    pipeline, shapes = manifest.pipeline, manifest.shapes
    shape: tuple[int, ...] = latents.shape if isinstance(latents, np.ndarray) else ()
    heights, widths = (sizes.scaled(1, pipeline.vae_scale_factor) for sizes in (shapes.height, shapes.width))
    if len(shape) != 4 or not (shape[1] == pipeline.latent_channels and shape[2] in heights and shape[3] in widths):
        raise RequestError(
            f"latents: expected an array [batch, {pipeline.latent_channels}, {heights.min} to {heights.max}, "
            f"{widths.min} to {widths.max}], got {list(shape) or type(latents).__name__}"
        )
    _latents(latents, (min(max(shape[0], 1), limits.MAX_BATCH), *shape[1:]), "latents")
