"""Render scenes from the atlas, a batch of one canvas at a time, on the atlas's device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import spelling
import torch
import torch.nn.functional as F
from phrases import COLOUR_NAMES, COLOURS
from scenes import CANVASES, DRAWING, LAYOUTS, centres, subjects, text_left, text_top
from torch import Tensor

AWAY = 9999  # a place outside every canvas


def geometry(canvas: int) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Return the centres of slots A and B of each layout, and the upper edge of its text."""
    width, height = CANVASES[canvas]
    slots = [(centres(n, width, height) + [(AWAY, AWAY)] * 2)[:2] for n in LAYOUTS]
    return slots, [text_top(n, height) for n in LAYOUTS]


class Renderer:
    """Renders scenes given as index tensors."""

    def __init__(self, atlas: Path, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._type = torch.half if self.device.type == "cuda" else torch.float
        arrays = np.load(atlas)
        sprites = torch.from_numpy(arrays["sprites"][:, : len(subjects())]).to(device).permute(0, 1, 4, 2, 3)
        self._per_style = sprites.shape[1]
        sprites = sprites.flatten(0, 1).to(self._type) / 255
        sprites[:, :3] *= sprites[:, 3:]  # premultiplied: interpolation must not bleed colour
        self._sprites = sprites  # [styles * subjects, 4, side, side]
        # The last glyph is none at all.
        self._glyphs = F.pad(torch.from_numpy(arrays["glyphs"]).to(device).to(self._type) / 255, (0, 0, 0, 0, 0, 1))
        colours = torch.tensor([COLOURS[n][0] for n in COLOUR_NAMES], device=device)
        self._colours = colours.to(self._type) / 255
        luma = (self._colours * self._colours.new_tensor([0.3, 0.59, 0.11])).sum(1)
        self._ink = 0.06 + 0.9 * (luma < 0.45).to(self._type)  # white on dark, black on light
        places = [geometry(c) for c in range(len(CANVASES))]
        self._centres = torch.tensor([p[0] for p in places], device=device).float()  # [canvases, layouts, 2, xy]
        self._tops = torch.tensor([p[1] for p in places], device=device)  # [canvases, layouts]

    def ground(self, colours: Tensor, canvas: int) -> Tensor:
        """Return plain backgrounds in [−1, 1]."""
        width, height = CANVASES[canvas]
        return self._colours[colours][:, :, None, None].expand(-1, -1, height, width) * 2 - 1

    def compose(self, scenes: Tensor, canvas: int, jitter: Tensor | None = None, zoom: Tensor | None = None) -> Tensor:
        """Return images [batch, 3, height, width] in [−1, 1], fp16 on a GPU.

        scenes [batch, COLUMNS] as ``Scene.as_row``, all of one canvas. jitter [batch, 6] moves slot
        A, slot B and the text, in pixels, and zoom [batch] scales the drawings: the autoencoders are
        trained on places and sizes that scenes do not have.
        """
        layout, a, b, colour, style = scenes[:, :5].long().unbind(1)
        moves = torch.zeros(len(scenes), 3, 2, device=self.device)
        if jitter is not None:
            moves = jitter.float().unflatten(1, (3, 2))
        middles = self._centres[canvas, layout] + moves[:, :2]
        side = torch.full((len(scenes),), float(DRAWING), device=self.device)
        side = side if zoom is None else side * zoom
        width, height = CANVASES[canvas]
        image = self._colours[colour][:, :, None, None].expand(-1, -1, height, width)
        for number, slot in ((a, 0), (b, 1)):
            where = torch.where((number >= 0)[:, None], middles[:, slot], float(AWAY))
            sprites = self._sprites[style * self._per_style + number.clamp(min=0)]
            pasted = self._place(sprites, where, side, width, height)
            image = image * (1 - pasted[:, 3:]) + pasted[:, :3]
        rows = (scenes[:, 6] >= 0).nonzero().squeeze(1)
        if len(rows):
            cover = self._written(scenes[rows].long(), canvas, moves[rows, 2].long())[:, None]
            ink = self._ink[colour[rows]][:, None, None, None]
            image[rows] = image[rows] * (1 - cover) + cover * ink
        return image * 2 - 1

    def _written(self, scenes: Tensor, canvas: int, moves: Tensor) -> Tensor:
        """Return the coverage [batch, height, width] of the scenes' rows of glyphs."""
        width, height = CANVASES[canvas]
        glyphs = scenes[:, 6:]
        length = (glyphs >= 0).sum(1)
        cell = torch.where(glyphs[:, 0] < len(spelling.LATIN), spelling.LATIN_WIDTH, spelling.HAN_WIDTH)
        left = (width - length * cell).div(2, rounding_mode="floor") // 16 * 16 + moves[:, 0]
        top = self._tops[canvas, scenes[:, 0]] + moves[:, 1]
        x = torch.arange(width, device=self.device)[None] - left[:, None]
        y = torch.arange(height, device=self.device)[None] - top[:, None]
        which = x.div(cell[:, None], rounding_mode="floor")
        inside = (which >= 0) & (which < length[:, None])
        number = torch.where(inside, glyphs.gather(1, which.clamp(0, glyphs.shape[1] - 1)), -1)
        inside_y = (y >= 0) & (y < spelling.CELL_HEIGHT)
        rows = y.clamp(0, spelling.CELL_HEIGHT - 1)
        column = x - which * cell[:, None]
        cover = self._glyphs[number[:, None], rows[:, :, None], column[:, None, :]]
        return cover * inside_y[:, :, None]

    def _place(self, tiles: Tensor, middles: Tensor, side: Tensor, width: int, height: int) -> Tensor:
        """Sample square tiles [batch, c, h, h] onto the canvas, at centres and sides in pixels."""
        canvas = torch.tensor([width, height], device=self.device).float()
        theta = torch.zeros(len(tiles), 2, 3, device=self.device)
        theta[:, 0, 0], theta[:, 1, 1] = width / side, height / side
        theta[:, :, 2] = (canvas - 2 * middles) / side[:, None]
        grid = F.affine_grid(theta, [len(tiles), 1, height, width], align_corners=False)
        return F.grid_sample(tiles, grid.to(tiles.dtype), align_corners=False)


def text_span(text: str, layout: str, canvas: int) -> tuple[int, int, int]:
    """Return left edge, upper edge and cell width of a scene's row of glyphs, in pixels."""
    width, height = CANVASES[canvas]
    cell = spelling.cell_width(text)
    return text_left(len(text), cell, width), text_top(layout, height), cell


def random_crop(images: Tensor, side: int) -> Tensor:
    """Cut a random window per image, aligned to latent cells or not."""
    batch, _, height, width = images.shape
    top = torch.randint(0, height - side + 1, (batch,), device=images.device)
    left = torch.randint(0, width - side + 1, (batch,), device=images.device)
    span = torch.arange(side, device=images.device)
    rows, columns = top[:, None] + span, left[:, None] + span
    index = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
