"""Jobs for the sampler loop of `_core`, whose conditioning is what the denoiser knows."""

from __future__ import annotations

from typing import Any

import numpy as np

from zimage_rt.backends.base import Conditioning, Guidance, SampleJob


def sample_job(
    steps: np.ndarray,
    latents: np.ndarray,
    scales: np.ndarray | None = None,
    normalization: float = 0.0,
    **rest: Any,
) -> SampleJob:
    """A job without contexts; without `scales`, there is no guidance. `rest`: other fields of `SampleJob`."""
    if scales is None:
        scales = np.zeros((len(steps), len(latents)), np.float32)
    return SampleJob(latents, Conditioning(()), steps, Guidance(scales, normalization), **rest)
