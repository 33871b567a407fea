"""Compose scenes from the atlas, a batch at a time, on whichever device holds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from phrases import COLOUR_NAMES, COLOURS
from scenes import CANVAS, CENTRES, LAYOUTS, PAIR_SIZE, SINGLE_SIZES, WORD_SUBJECT_SIZE
from torch import Tensor


class Renderer:
    """Draws scenes given as index tensors."""

    def __init__(self, atlas: Path, device: torch.device | str) -> None:
        self._type = torch.half if torch.device(device).type == "cuda" else torch.float
        arrays = np.load(atlas)
        sprites = torch.from_numpy(arrays["sprites"]).to(device).permute(0, 1, 4, 2, 3)
        self._per_style = sprites.shape[1]
        sprites = sprites.flatten(0, 1).to(self._type) / 255
        sprites[:, :3] *= sprites[:, 3:]  # premultiplied: interpolation must not bleed colour
        self._sprites = sprites  # [styles * subjects, 4, side, side]
        self._words = torch.from_numpy(arrays["words"]).to(device).to(self._type).unsqueeze(1) / 255
        colours = torch.tensor([COLOURS[n][0] for n in COLOUR_NAMES], device=device)
        self._colours = colours.to(self._type) / 255
        # [layouts, 2, xy]; the second row is the second subject or the word.
        centres = [(CENTRES[n] + [(0, 0)])[:2] for n in LAYOUTS]
        self._centres = torch.tensor(centres, device=device).float()
        single = torch.tensor(list(SINGLE_SIZES.values()), device=device).float()
        rows = [single]
        for name in LAYOUTS[1:]:
            rows.append(torch.full_like(single, WORD_SUBJECT_SIZE if name == "word" else PAIR_SIZE))
        self._sizes = torch.stack(rows)  # [layouts, sizes]
        self.device = torch.device(device)

    def compose(self, scenes: Tensor, jitter: Tensor, zoom: Tensor | None = None) -> Tensor:
        """Return images [batch, 3, 256, 256] in [−1, 1], fp16.

        scenes [batch, 7] as ``Scene.as_tuple``; jitter [batch, 4] in pixels; ``zoom`` [batch]
        scales the drawings (the autoencoders see sizes that the scenes do not have).
        """
        layout, a, b, colour, style, size, word = scenes.long().unbind(1)
        centres = self._centres[layout] + jitter.float().unflatten(1, (2, 2))
        side = self._sizes[layout, size]
        side = side if zoom is None else side * zoom
        canvas = self._colours[colour][:, :, None, None].expand(-1, -1, CANVAS, CANVAS)
        canvas = self._paste(canvas, self._sprites[style * self._per_style + a], centres[:, 0], side)
        has_b = (b >= 0).nonzero().squeeze(1)
        if len(has_b):
            sprites = self._sprites[style[has_b] * self._per_style + b[has_b]]
            canvas[has_b] = self._paste(canvas[has_b], sprites, centres[has_b, 1], side[has_b])
        has_word = (word >= 0).nonzero().squeeze(1)
        if len(has_word):
            canvas[has_word] = self._write(canvas[has_word], word[has_word], centres[has_word, 1])
        return canvas * 2 - 1

    def _paste(self, canvas: Tensor, sprites: Tensor, centres: Tensor, side: Tensor) -> Tensor:
        width = side[:, None].expand(-1, 2)
        pasted = self._place(sprites, centres, width)
        return canvas * (1 - pasted[:, 3:]) + pasted[:, :3]

    def _write(self, canvas: Tensor, word: Tensor, centres: Tensor) -> Tensor:
        masks = self._words[word]
        size = torch.tensor([masks.shape[3], masks.shape[2]], device=self.device).float()
        cover = self._place(masks, centres, size.expand(len(masks), 2))
        background = canvas[:, :, :1, :1]
        luma = (background * background.new_tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1)
        ink = (luma < 0.45).to(canvas.dtype)[:, None]  # white on dark, black on light
        return canvas * (1 - cover) + cover * (0.06 + 0.9 * ink)

    def _place(self, tiles: Tensor, centres: Tensor, size: Tensor) -> Tensor:
        """Sample tiles [batch, c, h, w] onto the canvas at centre and size given in pixels."""
        scale = CANVAS / size
        shift = (CANVAS - 2 * centres) / size
        theta = torch.zeros(len(tiles), 2, 3, device=self.device)
        theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0], scale[:, 1]
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta, [len(tiles), 1, CANVAS, CANVAS], align_corners=False)
        return F.grid_sample(tiles, grid.to(tiles.dtype), align_corners=False)


def random_crop(images: Tensor, side: int) -> Tensor:
    """Cut one random window a picture, on latent cells' borders or off them."""
    batch, _, height, width = images.shape
    top = torch.randint(0, height - side + 1, (batch,), device=images.device)
    left = torch.randint(0, width - side + 1, (batch,), device=images.device)
    span = torch.arange(side, device=images.device)
    rows, columns = top[:, None] + span, left[:, None] + span
    index = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
