"""Warnings about fields of a request with no effect, or another than asked; raised as RequestWarning and recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .types import GenerateRequest, ResolvedRequest, ResolvedSecondPass, SecondPass

# Fields that have an effect only together with something else, and what. The warning is for values off the default.
GUIDANCE = "guidance; ask for a guidance_scale of more than 0"
NEEDS = {
    "cfg_truncation": GUIDANCE,
    "cfg_normalization": GUIDANCE,
    "dynamic_cfg": GUIDANCE,
    "mask_feather": "a mask; give `mask`, or leave it out",
    "fit": "an image to fit; give `image` or `control_image`, or leave it out",
    "control_scale": "a control image; give `control_image`, or leave it out",
    "strength": "an image to begin with; give `image` or `image_latents`, or leave it out",
}


def without_effect(request: GenerateRequest, resolved: ResolvedRequest) -> Iterator[str]:
    """One sentence per field of a request that has no effect, or another than asked."""
    guided = resolved.guidance_scale > 0
    if not guided and any(text.strip() for text in resolved.negative_prompts):
        yield f"negative_prompt: it does nothing without {GUIDANCE}"
    begins = resolved.image is not None or resolved.image_latents is not None
    here = {
        "cfg_truncation": guided,
        "cfg_normalization": guided,
        "dynamic_cfg": guided,
        "mask_feather": resolved.mask is not None,
        "fit": resolved.image is not None or resolved.control_image is not None,
        "control_scale": resolved.control_image is not None,
        "strength": begins,
    }
    for name, needed in NEEDS.items():
        if not here[name] and getattr(request, name) != type(request).__dataclass_fields__[name].default:
            yield f"{name}: it does nothing without {needed}"
    if request.sigmas is not None and request.schedule != type(request).__dataclass_fields__["schedule"].default:
        yield "schedule: it does nothing beside `sigmas`, which are the schedule; leave one of them out"
    if begins:
        what = "image" if resolved.mask is None else "image's part that the mask marks"
        yield from _strength("", what, request, resolved.sigmas)
    if request.second_pass is not None and resolved.second_pass is not None:
        yield from _scale(request.second_pass.scale, resolved, resolved.second_pass)
        yield from _strength("second_pass.", "first pass", request.second_pass, resolved.second_pass.sigmas)


def _scale(scale: float, first: ResolvedRequest, second: ResolvedSecondPass) -> Iterator[str]:
    """Warn that the second pass has another size than the scaled one, by a pixel or more."""
    height, width = first.height * scale, first.width * scale
    if (round(height), round(width)) != (second.height, second.width):
        yield (
            f"second_pass.scale: {scale:g} times {first.width}x{first.height} is {width:g}x{height:g}; the second pass "
            f"is drawn at {second.width}x{second.height}, the nearest size that the bundle serves"
        )


def _strength(prefix: str, what: str, part: GenerateRequest | SecondPass, sigmas: np.ndarray) -> Iterator[str]:
    """Warn of a strength beside a denoise, which goes before it.

    Warn, too, that a strength or a denoise below 1 begins from noise alone, which it does if the first sigma is 1.
    """
    steps, strength = len(sigmas) - 1, part.strength
    if part.denoise is not None and strength != type(part).__dataclass_fields__["strength"].default:
        yield f"{prefix}strength: it does nothing beside `{prefix}denoise`; leave one of them out"
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
