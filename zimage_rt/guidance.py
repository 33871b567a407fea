"""Classifier-free guidance in numpy: the reference that the C++ loop is held to.

The formulas are those of diffusers' ZImagePipeline: guidance is on where `scale > 0`, and
`pred = positive + scale * (positive - negative)`.
"""

from __future__ import annotations

import numpy as np


def guidance_active(scale: float, truncation: float, timestep: float) -> bool:
    """Whether a step at `timestep` (1 - sigma) is guided: `truncation` ends guidance late in the run."""
    return scale > 0 and not (truncation <= 1 and timestep > truncation)


def apply_guidance(positive: np.ndarray, negative: np.ndarray, scale: float, normalization: float = 0.0) -> np.ndarray:
    """Combine predictions `[batch, ...]`, sample by sample.

    `normalization` > 0 keeps the guided norm at or under that multiple of the positive norm.
    """
    guided = positive + np.float32(scale) * (positive - negative)
    if normalization > 0:
        axes = tuple(range(1, positive.ndim))
        limit = normalization * np.sqrt(np.sum(np.square(positive, dtype=np.float64), axis=axes))
        norms = np.sqrt(np.sum(np.square(guided, dtype=np.float64), axis=axes))
        factor = np.where(norms > limit, limit / np.maximum(norms, 1e-30), 1.0)
        guided *= factor.astype(np.float32).reshape(-1, *[1] * (positive.ndim - 1))
    return guided
