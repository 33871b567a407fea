"""Seed to noise: the numbers `torch.randn` gives on the CPU for that seed, to a few units in the last place.

As torch does, the generator takes the low 32 bits of a seed alone; the Brownian paths of some samplers take all 64.
"""

from __future__ import annotations

import numpy as np

from .._core import randn

MAX_SEED = 2**64 - 1


def prepare_noise(seeds: tuple[int, ...], sample_shape: tuple[int, ...], *, joint: bool = False) -> np.ndarray:
    """Noise for a batch: one generator an image, so that each can be repeated alone.

    With `joint` it is one generator's for the whole batch, the first seed's, as ComfyUI draws it.

    Returns:
        float32 `[len(seeds), *sample_shape]`; row i is
        `torch.randn(1, *sample_shape, generator=torch.Generator("cpu").manual_seed(seeds[i]))`.
    """
    if joint:
        return randn(seeds[0], [len(seeds), *sample_shape])
    return np.stack([randn(seed, list(sample_shape)) for seed in seeds])
