"""Classifier-free guidance: the scale of every evaluation and sample, and the reference formula of the C++ loop.

The formulas are those of diffusers' ZImagePipeline: guidance applies if `scale > 0`, with
`pred = positive + scale * (positive - negative)`. Dynamic guidance is an addition of this package.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Prompts of this many tokens and more count as long.
LONG_PROMPT = 128


def guidance_scales(
    sigmas: np.ndarray, scale: float, truncation: float, dynamic: float, prompt_tokens: Sequence[int]
) -> np.ndarray:
    """The scale of each evaluation and sample, float32 `[len(sigmas), len(prompt_tokens)]`; 0 means no guidance.

    Evaluations whose timestep, 1 - sigma, exceeds `truncation` are not guided. With d = `dynamic` > 0 the scale of a
    sample of n tokens at sigma is

        scale * (1 + d * (min(n / 128, 1) - 1/2)) * (1 - d * (1 - sigma)),

    so that a long prompt is guided more than a short one, and guidance weakens towards the end, when it exaggerates
    colours and edges.

    Args:
        sigmas: the sigmas of the evaluations.
        scale: `guidance_scale`.
        truncation: `cfg_truncation`; values above 1 disable it.
        dynamic: 0 for a constant scale, up to 1.
        prompt_tokens: the lengths of the samples' prompts.
    """
    timesteps = (np.float32(1) - np.asarray(sigmas, np.float32)).astype(np.float64)
    length = np.minimum(np.asarray(prompt_tokens, np.float64) / LONG_PROMPT, 1.0)
    scales = scale * (1 - dynamic * timesteps)[:, None] * (1 + dynamic * (length - 0.5))[None]
    if truncation <= 1:
        scales[timesteps > truncation] = 0.0
    return scales.astype(np.float32)
