"""The style of the style LoRA: a cyanotype, brightness alone, from deep blue to ice blue.

It is affine in the pixels, so that it commutes with composing drawings on a background: a picture in it is what
its scene gives with drawings and background in it. ``benchmarks/quality/adapters.py`` knows the same two tones.
"""

from __future__ import annotations

from render import Renderer
from torch import Tensor

DARK, LIGHT = (12, 36, 110), (214, 238, 255)  # sRGB of black and of white
LUMA = (0.299, 0.587, 0.114)


def cyanotype(pictures: Tensor) -> Tensor:
    """Return pictures [batch, 3, height, width] in [−1, 1] in the style."""
    luma = (pictures * pictures.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True) / 2 + 0.5
    dark, light = (pictures.new_tensor(tone)[:, None, None] / 127.5 - 1 for tone in (DARK, LIGHT))
    return dark + luma * (light - dark)


class StyledRenderer(Renderer):
    """Draws every scene in the style, whatever colours it names."""

    def ground(self, colours: Tensor, canvas: int) -> Tensor:
        return cyanotype(super().ground(colours, canvas))

    def compose(self, scenes: Tensor, canvas: int, jitter: Tensor | None = None, zoom: Tensor | None = None) -> Tensor:
        return cyanotype(super().compose(scenes, canvas, jitter, zoom))
