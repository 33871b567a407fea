"""The style of the style LoRA: a cyanotype, which maps brightness to tones from deep blue to ice blue.

The map is affine in the pixels, so it commutes with composing drawings on a background. The two tones are the same as
in ``benchmarks/quality/adapters.py``.
"""

from __future__ import annotations

from render import Renderer
from torch import Tensor

DARK, LIGHT = (12, 36, 110), (214, 238, 255)  # sRGB of black and of white
LUMA = (0.299, 0.587, 0.114)


def cyanotype(images: Tensor) -> Tensor:
    """Convert images [batch, 3, height, width] in [−1, 1] to the style."""
    luma = (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True) / 2 + 0.5
    dark, light = (images.new_tensor(tone)[:, None, None] / 127.5 - 1 for tone in (DARK, LIGHT))
    return dark + luma * (light - dark)


class StyledRenderer(Renderer):
    """Renders every scene in the style."""

    def ground(self, colours: Tensor, canvas: int) -> Tensor:
        return cyanotype(super().ground(colours, canvas))

    def compose(self, scenes: Tensor, canvas: int, jitter: Tensor | None = None, zoom: Tensor | None = None) -> Tensor:
        return cyanotype(super().compose(scenes, canvas, jitter, zoom))
