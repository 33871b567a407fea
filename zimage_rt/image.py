"""Arrays to pictures."""

from __future__ import annotations

import numpy as np


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Decoder output `[batch, 3, height, width]` in [-1, 1] to uint8 `[batch, height, width, 3]`.

    Rounds to the nearest value, as diffusers' VaeImageProcessor does.
    """
    scaled = np.clip(images * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1))
