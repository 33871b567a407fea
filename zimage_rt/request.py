"""What a caller asks for and what comes back. Everything is checked before any work is done."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RequestError
from .image import FITS, fit_image, flatten, read_image, read_mask
from .manifest import Manifest, ShapeRange
from .rng import MAX_SEED
from .samplers import DEFAULT_SAMPLER, SAMPLERS
from .schedule import DEFAULT_SCHEDULE, SCHEDULES, custom_sigmas, denoise_sigmas, first_step, schedule_sigmas
from .tokenizer import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from .metadata import PictureRecord

VAES = ("tiny", "full")
# Whose noise an image of a batch gets: that of its own seed, or its part of what the first seed gives for all of them.
BATCH_NOISE = ("separate", "comfyui")
# What becomes of a size that no bundle can serve: it is refused, or the nearest that is served is taken.
FIT_SIZES = ("exact", "nearest")
# ComfyUI makes a schedule of steps / denoise steps.
MAX_SCHEDULE = 1000


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
        dynamic_cfg: 0 to 1: how far the scale follows the prompt's length and the step; `guidance.py` has the formula.
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


def make_request(**fields: Any) -> GenerateRequest:
    """A request from its fields by name. Raises RequestError for one that there is not, with those that there are."""
    try:
        return GenerateRequest(**fields)
    except TypeError as error:
        known = ", ".join(GenerateRequest.__dataclass_fields__)
        raise RequestError(f"{error}; known fields: {known}") from error


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What came of a request.

    Attributes:
        images: uint8 `[batch, height, width, 3]`.
        seeds: one an image: asking for it alone with that seed gives the same picture, unless `batch_noise` was
            `comfyui`.
        timings: seconds by stage: encode_prompt, denoise, decode, total; encode_image, encode_control and upscale
            where they are.
        bundle_id: which bundle made it.
        latents: float32 `[batch, 16, height / 8, width / 8]`, what the images were decoded from.
        records: one an image: how it was made, which `save` writes into it.
    """

    images: np.ndarray
    seeds: tuple[int, ...]
    timings: dict[str, float]
    bundle_id: str
    latents: np.ndarray
    records: tuple[PictureRecord, ...] = ()

    @property
    def pil_images(self) -> list[Image]:
        """The images as `PIL.Image.Image`."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]

    def only(self, index: int) -> GenerateResult:
        """One picture's part of the result."""
        part = slice(index, index + 1)
        return GenerateResult(
            self.images[part], self.seeds[part], self.timings, self.bundle_id, self.latents[part], self.records[part]
        )

    def save(self, where: str | Path, *, sidecar: bool = True) -> list[Path]:
        """Write the pictures as PNG with all it takes to draw them again; see `zimage_rt.saving`.

        Args:
            where: `panda.png` for one picture, which replaces what has that name, `panda-000.png`, … for several;
                anything else is a folder: `000-<seed>.png`, …, counting on from what it holds and replacing nothing.
            sidecar: write each one's record beside it too, as `<name>.json`.

        Returns:
            where the pictures are.

        Raises:
            RequestError: the name asks for another format.
            OSError: the folder cannot be made or written, or is full; no picture is there by half.
        """
        from .saving import save_result

        return save_result(self, Path(where), sidecar=sidecar)


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
    """A request with every default filled in and every field checked; one entry an image.

    `sigmas` are those that are run; `image` and `control_image` are uint8 `[height, width, 3]`, `mask` is uint8
    `[height, width]`, 255 where to draw. `warnings` say what of the request has no effect, one sentence each.
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
    warnings: tuple[str, ...] = ()


def resolve(request: GenerateRequest, manifest: Manifest) -> ResolvedRequest:
    """Check a request against what the bundle serves. Raises RequestError."""
    defaults, shapes = manifest.pipeline, manifest.shapes
    prompts = _texts(request.prompt, "prompt")
    if not prompts:
        raise RequestError("prompt: expected at least one, got an empty list")
    negatives = _texts(request.negative_prompt, "negative_prompt")
    if len(negatives) not in (1, len(prompts)):
        raise RequestError(f"negative_prompt: expected 1 or {len(prompts)}, one for each prompt, got {len(negatives)}")
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives

    num_images = _integer(request.num_images, "num_images", 1, shapes.batch.max)
    batch = len(prompts) * num_images
    if batch not in shapes.batch:
        raise RequestError(
            f"batch: expected at most {shapes.batch.max} images a request, got {batch} "
            f"({len(prompts)} prompts, {num_images} each); split the request"
        )
    scale = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    vae = request.vae or next((v for v in VAES if f"{v}_vae_decoder" in manifest.modules), "tiny")
    if vae not in VAES:
        raise RequestError(f"vae: expected tiny or full, got {vae!r}")
    if f"{vae}_vae_decoder" not in manifest.modules:
        raise RequestError(f'vae: this bundle has no {vae} VAE; export it again with vae = ["{vae}"]')
    picture = None if request.image is None else read_image(request.image, "image")
    control = _control_picture(request, manifest)
    begins = picture is not None or request.latents is not None or request.image_latents is not None
    scale = _number(scale, "guidance_scale")
    # Beside guidance or an image, no text means no wish of its own, as in diffusers and ComfyUI.
    if not (begins or control is not None or scale > 0) and not all(prompt.strip() for prompt in prompts):
        raise RequestError(
            "prompt: expected some text, got an empty one; say what to draw, or give an image or a guidance_scale of "
            "more than 0, with which an empty prompt has a meaning"
        )
    height, width = (_pixels(request, manifest, name, picture if begins else control) for name in ("height", "width"))
    if request.image_latents is not None:
        if picture is not None or request.latents is not None:
            raise RequestError(
                "image_latents: expected it without `image` and `latents`; all three say what to begin with"
            )
        if request.mask is not None:
            raise RequestError("mask: expected an image, whose pixels are kept; give `image`, not `image_latents`")
    image, mask = _pictures(request, picture, height, width)
    shift = _shift(request, manifest)
    again = _second_pass(request, manifest, shift, height, width, control)
    encodes = image is not None or (again is not None and again.method == "pixel")
    if (encodes or control is not None) and f"{vae}_vae_encoder" not in manifest.modules:
        name = "image" if encodes else "control_image"
        raise RequestError(f'{name}: this bundle has no {vae} VAE encoder; export it again with vae = ["{vae}"]')
    factor = defaults.vae_scale_factor
    shape = (batch, defaults.latent_channels, height // factor, width // factor)
    batch_noise = _choice(request.batch_noise, "batch_noise", BATCH_NOISE)
    resolved = ResolvedRequest(
        prompts=tuple(prompt for prompt in prompts for _ in range(num_images)),
        negative_prompts=tuple(text for text in negatives for _ in range(num_images)),
        seeds=_seeds(request.seed, batch, joint=batch_noise == "comfyui"),
        height=height,
        width=width,
        sampler=_choice(request.sampler, "sampler", SAMPLERS),
        sigmas=_sigmas(request, manifest, shift),
        guidance_scale=scale,
        cfg_truncation=_number(request.cfg_truncation, "cfg_truncation"),
        cfg_normalization=_number(request.cfg_normalization, "cfg_normalization"),
        dynamic_cfg=_number(request.dynamic_cfg, "dynamic_cfg", 1.0),
        vae=vae,
        latents=None if request.latents is None else _latents(request.latents, shape, "latents"),
        image=image,
        image_latents=None
        if request.image_latents is None
        else _latents(request.image_latents, shape, "image_latents"),
        mask=mask,
        control_image=None if control is None else _fitted(control, width, height, request.fit),
        control_scale=_number(request.control_scale, "control_scale"),
        second_pass=again,
        vae_tile=None if request.vae_tile is None else _tile(request.vae_tile, defaults.size_multiple),
        shift=shift,
        batch_noise=batch_noise,
        truncate_prompt=_flag(request.truncate_prompt, "truncate_prompt"),
    )
    return dataclasses.replace(resolved, warnings=tuple(_warnings(request, resolved)))


def _warnings(request: GenerateRequest, resolved: ResolvedRequest) -> Iterator[str]:
    """What of a request has no effect."""
    if resolved.guidance_scale == 0 and any(text.strip() for text in resolved.negative_prompts):
        yield "negative_prompt: it does nothing without guidance; ask for a guidance_scale of more than 0"
    if resolved.image is not None or resolved.image_latents is not None:
        what = "image" if resolved.mask is None else "image's part that the mask marks"
        yield from _strength_warning("", what, request, resolved.sigmas)
    if request.second_pass is not None and resolved.second_pass is not None:
        yield from _strength_warning("second_pass.", "first pass", request.second_pass, resolved.second_pass.sigmas)


def _strength_warning(prefix: str, what: str, part: GenerateRequest | SecondPass, sigmas: np.ndarray) -> Iterator[str]:
    """Says that a strength or a denoise of less than 1 begins from noise alone: at the first sigma, if that is 1."""
    steps, strength = len(sigmas) - 1, part.strength
    if (strength if part.denoise is None else part.denoise) >= 1 or sigmas[0] < 1:
        return
    if part.denoise is not None:
        most = math.floor(steps / (steps + 1) * 1e4) / 1e4
        yield (
            f"{prefix}denoise: the last {steps} of int({steps} / {part.denoise:g}) steps are all of them, so that the "
            f"{what} is ignored, as with 1; ask for at most {most:g}, or more steps"
        )
        return
    name = f"{prefix}strength"
    if steps == 1:
        asked, instead = "1 step", "more steps"
    else:
        asked, instead = f"{steps} steps", f"at most {math.floor((1 - 1 / steps) * 1e4) / 1e4:g}, or more steps"
    yield f"{name}: {strength:g} of {asked} is all of them, so that the {what} is ignored, as with 1; ask for {instead}"


def _shift(request: GenerateRequest, manifest: Manifest) -> float:
    if request.shift is None:
        return manifest.pipeline.shift
    shift = _number(request.shift, "shift", 100.0)
    if shift == 0:
        raise RequestError("shift: expected more than 0, at which every sigma is 0, and at most 100")
    return shift


def _tile(value: Any, multiple: int) -> int:
    size = _integer(value, "vae_tile", 8 * multiple, 1 << 20)
    if size % multiple:
        raise RequestError(f"vae_tile: expected a multiple of {multiple}, got {size}")
    return size


def _control_picture(request: GenerateRequest, manifest: Manifest) -> Image | None:
    if request.control_image is None:
        return None
    if "controlnet" not in manifest.modules:
        raise RequestError(
            "control_image: this bundle has no ControlNet; export it again with one: "
            "zimage-export … --controlnet PATH, or `controlnet` under [parts] of the recipe"
        )
    return read_image(request.control_image, "control_image")


def _fitted(picture: Image, width: int, height: int, fit: str) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    return np.asarray(fit_image(flatten(picture), width, height, fit), np.uint8)


def _second_pass(
    request: GenerateRequest, manifest: Manifest, shift: float, height: int, width: int, control: Image | None
) -> ResolvedSecondPass | None:
    again = request.second_pass
    if again is None:
        return None
    if not isinstance(again, SecondPass):
        raise RequestError(f"second_pass: expected a SecondPass, got {type(again).__name__}")
    if request.mask is not None:
        raise RequestError("second_pass and mask: expected one of them; draw again over the result in a second request")
    scale = _number(again.scale, "second_pass.scale")
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
    own = again.num_inference_steps is not None
    schedule = dataclasses.replace(
        request,
        image=again,  # it begins with a picture: the first pass's
        strength=again.strength,
        denoise=again.denoise,
        sigmas=None if own else request.sigmas,
        num_inference_steps=again.num_inference_steps if own else request.num_inference_steps,
    )
    method = _choice(again.method, "second_pass.method", SECOND_PASS_METHODS)
    # From the picture itself: it may be larger than the first pass.
    fitted = None if control is None else _fitted(control, sizes[1], sizes[0], request.fit)
    return ResolvedSecondPass(sizes[0], sizes[1], method, _sigmas(schedule, manifest, shift), fitted)


def _choice(value: Any, name: str, known: Iterable[str]) -> str:
    names = tuple(known)
    if value not in names:
        raise RequestError(f"{name}: expected one of {', '.join(names)}, got {value!r}")
    return value


def _sigmas(request: GenerateRequest, manifest: Manifest, shift: float) -> np.ndarray:
    """The sigmas that are run: the whole schedule, or its end where an image is the beginning."""
    schedule = _choice(request.schedule, "schedule", SCHEDULES)
    spare = SAMPLERS[_choice(request.sampler, "sampler", SAMPLERS)].spare_step
    begins = request.image is not None or request.image_latents is not None
    denoise = _denoise(request, begins)
    if request.sigmas is None:
        steps = request.num_inference_steps
        steps = manifest.pipeline.num_inference_steps if steps is None else steps
        steps = _integer(steps, "num_inference_steps", 1, 1000)
        if denoise is not None:
            if steps / denoise > MAX_SCHEDULE:
                raise RequestError(
                    f"denoise: expected at least {steps / MAX_SCHEDULE:g} with {steps} steps, so that the schedule has "
                    f"at most {MAX_SCHEDULE}, got {denoise:g}"
                )
            return denoise_sigmas(schedule, steps, shift, denoise, spare_step=spare)
        sigmas = schedule_sigmas(schedule, steps, shift, spare_step=spare)
    else:
        if denoise is not None and denoise < 1:
            raise RequestError("denoise: expected none beside `sigmas`, which are run whole; give those to run")
        given = np.asarray(request.sigmas, np.float64)
        falling = given.ndim == 1 and len(given) > 0 and bool((np.diff(given) < 0).all())
        if not falling or not (given[-1] > 0 and given[0] <= 1):
            raise RequestError("sigmas: expected numbers that fall, from at most 1 to more than 0; the last 0 is added")
        if request.num_inference_steps not in (None, len(given)):
            raise RequestError(
                f"num_inference_steps: expected {len(given)}, as many as there are sigmas, or none, "
                f"got {request.num_inference_steps}"
            )
        sigmas = custom_sigmas(given, shift)
    if not begins or denoise is not None:
        return sigmas
    strength = _number(request.strength, "strength", 1.0)
    if strength == 0:
        raise RequestError("strength: expected more than 0, which would change nothing, and at most 1")
    return sigmas[first_step(len(sigmas) - 1, strength) :]


def _denoise(request: GenerateRequest, begins: bool) -> float | None:
    if request.denoise is None:
        return None
    denoise = _number(request.denoise, "denoise", 1.0)
    if denoise == 0:
        raise RequestError("denoise: expected more than 0, which would change nothing, and at most 1")
    if denoise < 1 and not begins:
        raise RequestError("denoise: expected an image to begin with; give `image` or `image_latents`, or denoise 1")
    return denoise


def _pictures(
    request: GenerateRequest, picture: Image | None, height: int, width: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    fit = _choice(request.fit, "fit", FITS)
    feather = _number(request.mask_feather, "mask_feather")
    if picture is None:
        if request.mask is not None:
            raise RequestError("mask: expected an image that it belongs to; give `image` too")
        return None, None
    if request.latents is not None:
        raise RequestError("image and latents: expected one of them; both say what to begin with")
    image = _fitted(picture, width, height, fit)
    mask = None if request.mask is None else read_mask(request.mask, picture.size, width, height, fit, feather)
    if mask is not None and not mask.any():
        raise RequestError("mask: expected some white, where to draw; got none, so that nothing would change")
    return image, mask


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name}: expected a string or a list of strings, got {type(value).__name__}")
    for text in texts:
        check_text(text, name)
    return tuple(texts)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise RequestError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RequestError(f"{name}: expected a whole number, got {value!r}")
    if not low <= value <= high:
        raise RequestError(f"{name}: expected {low} to {high}, got {value}")
    return int(value)


def _number(value: Any, name: str, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise RequestError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise RequestError(f"{name}: expected a finite number, 0 or more, got {value}")
    if value > high:
        raise RequestError(f"{name}: expected at most {high:g}, got {value}")
    return float(value)


def _pixels(request: GenerateRequest, manifest: Manifest, name: str, picture: Image | None) -> int:
    allowed = getattr(manifest.shapes, name)
    value = getattr(request, name)
    size = allowed.opt if value is None else _integer(value, name, 1, 1 << 20)
    if value is None and picture is not None:
        size = getattr(picture, name) // allowed.multiple * allowed.multiple
    elif value is None and request.image_latents is not None:
        # What has another shape is refused with the others' checks.
        shape = (0, 0, *np.shape(request.image_latents)[2:])
        size = shape[2 if name == "height" else 3] * manifest.pipeline.vae_scale_factor if len(shape) == 4 else size
    near = [] if value is None else _nearest(size, allowed)
    if _choice(request.fit_size, "fit_size", FIT_SIZES) == "nearest" and near:
        return near[0]
    if size not in allowed:
        if near:
            which = f"are {min(near)} and {max(near)}: choose one" if len(near) > 1 else f"is {near[0]}: choose it"
            raise RequestError(
                f"{name}: expected {allowed.min} to {allowed.max} in steps of {allowed.multiple}, got {size}; the "
                f"nearest {which}, or let fit_size='nearest' take {near[0]}"
            )
        raise RequestError(
            f"{name}: expected {allowed.min} to {allowed.max} in steps of {allowed.multiple}, "
            f"got {size}; choose a size in that range, or export the bundle with a wider one"
        )
    return size


def _nearest(size: int, allowed: ShapeRange) -> list[int]:
    """What is served within a step of a size between two steps, the nearest first, of two as near the smaller."""
    below = size // allowed.multiple * allowed.multiple
    around = () if size == below else (below, below + allowed.multiple)
    return sorted((value for value in around if value in allowed), key=lambda value: abs(value - size))


def _seeds(seed: Any, batch: int, *, joint: bool) -> tuple[int, ...]:
    if seed is None:
        # 32 bits: what people can copy by hand, and all of a seed that the generator uses.
        seed = secrets.randbits(32)
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != batch:
            raise RequestError(f"seed: expected one number or {batch} of them, got {len(seed)}")
        seeds = tuple(_integer(item, "seed", 0, MAX_SEED) for item in seed)
        if joint and len(set(seeds)) > 1:
            raise RequestError("seed: expected one for all images with batch_noise 'comfyui', got several")
        return seeds
    first = _integer(seed, "seed", 0, MAX_SEED)
    if joint:
        return (first,) * batch
    return tuple((first + i) % (MAX_SEED + 1) for i in range(batch))


def _latents(latents: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = np.asarray(latents)
    if array.shape != shape:
        raise RequestError(f"{name}: expected {list(shape)}, got {list(array.shape)}")
    if array.dtype != np.float32 or not np.isfinite(array).all():
        raise RequestError(f"{name}: expected finite float32 values, got {array.dtype}")
    return array
