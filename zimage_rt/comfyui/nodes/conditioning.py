"""Prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...denoise import Prompt as PromptValue
from ..graph import WorkflowError
from ..registry import node
from ..run import Run
from ..values import Conditioning, Latent
from .latents import encode
from .sockets import ClipIn, ConditioningIn, ImageIn, MaskIn, Prompt, VaeIn, YesNo

# Prompts of one CONDITIONING: combining one with itself, and that again, doubles them each time.
MAX_PROMPTS = 64


@node("CLIPTextEncode", "CONDITIONING", category="conditioning")
def encode_text(run: Run, text: Prompt, clip: ClipIn) -> tuple[Any, ...]:
    r"""A prompt. ComfyUI's weights, as in `(panda:1.5)`, have no meaning for Z-Image; `\(` is a bracket."""
    del run
    return (Conditioning((PromptValue(text.replace(r"\(", "(").replace(r"\)", ")")),), clip),)


@node("ConditioningZeroOut", "CONDITIONING", category="advanced/conditioning")
def zero_out(run: Run, conditioning: ConditioningIn) -> tuple[Any, ...]:
    """As many zeros as the prompt has numbers."""
    del run
    zeroed = tuple(dataclasses.replace(prompt, is_zeroed=True) for prompt in conditioning.prompts)
    return (dataclasses.replace(conditioning, prompts=zeroed),)


@node("ConditioningCombine", "CONDITIONING", category="conditioning")
def combine(run: Run, conditioning_1: ConditioningIn, conditioning_2: ConditioningIn) -> tuple[Any, ...]:
    """The prompts of both, of whose predictions the mean counts."""
    del run
    one, two = conditioning_1, conditioning_2
    if one.clip != two.clip:
        raise WorkflowError(
            f"conditioning_2: expected prompts of the bundle {one.clip.bundle}, got those of {two.clip.bundle}; "
            "use one CLIP for both"
        )
    count = len(one.prompts) + len(two.prompts)
    if count > MAX_PROMPTS:
        raise WorkflowError(f"conditioning_2: expected at most {MAX_PROMPTS} prompts in all, got {count}")
    return (Conditioning((*one.prompts, *two.prompts), one.clip),)


@node("InpaintModelConditioning", "CONDITIONING", "CONDITIONING", "LATENT", category="conditioning/inpaint")
def inpaint(
    run: Run,
    positive: ConditioningIn,
    negative: ConditioningIn,
    vae: VaeIn,
    pixels: ImageIn,
    mask: MaskIn,
    noise_mask: YesNo = True,
) -> tuple[Any, ...]:
    """The prompts as they are, and the image's latent with the soft mask."""
    return positive, negative, Latent(encode(run, vae, pixels), mask if noise_mask else None)
