"""Seed to noise: the numbers `torch.randn` gives on the CPU for that seed."""

from __future__ import annotations

import numpy as np

from . import _core

MAX_SEED = 2**64 - 1


def prepare_noise(seeds: tuple[int, ...], sample_shape: tuple[int, ...]) -> np.ndarray:
    """Noise for a batch: one generator an image, so that each can be repeated alone.

    Returns:
        float32 `[len(seeds), *sample_shape]`; row i is
        `torch.randn(1, *sample_shape, generator=torch.Generator("cpu").manual_seed(seeds[i]))`.
    """
    return np.stack([_core.randn(seed, list(sample_shape)) for seed in seeds])
