"""Noise from seeds: the numbers of `torch.randn` on the CPU for the seed, to a few units in the last place.

As in torch, the generator uses only the low 32 bits of a seed; the Brownian paths of some samplers use all 64.
"""

from __future__ import annotations

import numpy as np

from .._core import randn

MAX_SEED = 2**64 - 1


def prepare_noise(seeds: tuple[int, ...], sample_shape: tuple[int, ...], *, joint: bool = False) -> np.ndarray:
    """The noise of a batch, with one generator per image, so that each image can be repeated alone.

    With `joint` the whole batch is drawn from one generator of the first seed, as in ComfyUI.

    Returns:
        float32 `[len(seeds), *sample_shape]`; row i is
        `torch.randn(1, *sample_shape, generator=torch.Generator("cpu").manual_seed(seeds[i]))`.
    """
    if joint:
        return randn(seeds[0], [len(seeds), *sample_shape])
    return np.stack([randn(seed, list(sample_shape)) for seed in seeds])
