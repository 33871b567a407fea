"""Classifier-free guidance: its scale for every evaluation and sample, and the formula that the C++ loop is held to.

The formulas are those of diffusers' ZImagePipeline: guidance is on where `scale > 0`, and
`pred = positive + scale * (positive - negative)`. Dynamic guidance is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Prompts of this many tokens and more count as long.
LONG_PROMPT = 128


def guidance_scales(
    sigmas: np.ndarray, scale: float, truncation: float, dynamic: float, prompt_tokens: Sequence[int]
) -> np.ndarray:
    """The scale of each evaluation and sample, float32 `[len(sigmas), len(prompt_tokens)]`; 0 is none.

    `truncation` ends guidance late in the run: at an evaluation whose timestep, 1 - sigma, exceeds it. With d =
    `dynamic` > 0 a sample of n tokens gets at sigma

        scale * (1 + d * (min(n / 128, 1) - 1/2)) * (1 - d * (1 - sigma)),

    so that a prompt that says much steers more than one that says little, and steering eases off as the picture
    settles: what it exaggerates at the end, colours and edges, is left alone.

    Args:
        sigmas: of the evaluations.
        scale: `guidance_scale`.
        truncation: `cfg_truncation`; above 1 means never.
        dynamic: 0 for the same scale throughout, 1 for the most.
        prompt_tokens: the lengths of the samples' prompts.
    """
    timesteps = (np.float32(1) - np.asarray(sigmas, np.float32)).astype(np.float64)
    length = np.minimum(np.asarray(prompt_tokens, np.float64) / LONG_PROMPT, 1.0)
    scales = scale * (1 - dynamic * timesteps)[:, None] * (1 + dynamic * (length - 0.5))[None]
    if truncation <= 1:
        scales[timesteps > truncation] = 0.0
    return scales.astype(np.float32)


def apply_guidance(positive: np.ndarray, negative: np.ndarray, scale: float, normalization: float = 0.0) -> np.ndarray:
    """Combine predictions `[batch, ...]`, sample by sample.

    `normalization` > 0 keeps the guided norm at or under that multiple of the positive norm.
    """
    if scale <= 0:
        return positive
    guided = positive + np.float32(scale) * (positive - negative)
    if normalization > 0:
        axes = tuple(range(1, positive.ndim))
        limit = normalization * np.sqrt(np.sum(np.square(positive, dtype=np.float64), axis=axes))
        norms = np.sqrt(np.sum(np.square(guided, dtype=np.float64), axis=axes))
        factor = np.where(norms > limit, limit / np.maximum(norms, 1e-30), 1.0)
        guided *= factor.astype(np.float32).reshape(-1, *[1] * (positive.ndim - 1))
    return guided
