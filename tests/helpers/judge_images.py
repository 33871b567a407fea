"""Images composed from the judge's atlas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from zimage_rt.benchmarks.quality.judge import Judge


def compose(judge: Judge, scene: Mapping[str, Any], shift: tuple[int, int] = (0, 0), order: int = 1) -> np.ndarray:
    """Draw a scene as the judge's data describes it; ``order`` −1 swaps a pair."""
    atlas = judge.atlas
    ground = atlas.colours[scene["colour"]]
    canvas = (scene.get("width", 256), scene.get("height", 256))
    image = Image.new("RGB", canvas, tuple(round(255 * v) for v in ground))
    size = atlas.sizes[scene["layout"]][scene["size"]]
    style = atlas.styles.index(scene["style"])
    for code, (x, y) in zip(scene["subjects"][::order], atlas.places(scene), strict=True):
        sprite = Image.fromarray(atlas.sprites[style, atlas.hexcodes.index(code)])
        sprite = sprite.resize((size, size), Image.Resampling.BICUBIC)
        corner = (x - size // 2 + shift[0], y - size // 2 + shift[1])
        image.paste(sprite, corner, sprite)
    corners, cell = atlas.glyph_cells(scene)
    dark = ground @ np.array([0.3, 0.59, 0.11]) < 0.45
    for glyph, (x, y) in zip(scene.get("word", ""), corners, strict=False):
        mask = Image.fromarray(atlas.glyphs[atlas.alphabet.index(glyph)][:, :cell])
        image.paste((245, 245, 245) if dark else (15, 15, 15), (x + shift[0] // 2, y + shift[1] // 2), mask)
    return np.asarray(image)
