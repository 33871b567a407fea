"""Compose scenes in latent space.

Drawings and glyphs are on a grid of latent cells, and the tiny encoder has a small receptive field.
So the latents of a scene are those of the plain background plus a difference per drawing or glyph.
The differences are encoded once per drawing, colour and style, and once per glyph and colour; then
scenes are composed without encoding.
"""

from __future__ import annotations

import time

import spelling
import torch
from phrases import COLOUR_NAMES, STYLE_NAMES
from render import AWAY, Renderer, geometry
from scenes import CANVASES, COLUMNS, DRAWING, LAYOUTS, subjects
from torch import Tensor, nn

CELL = 8  # pixels
TILE = DRAWING // CELL + 2  # side in cells: a drawing and a border of one cell
GLYPH_ROWS, GLYPH_COLUMNS = spelling.CELL_HEIGHT // CELL + 2, spelling.HAN_WIDTH // CELL + 2
CONTEXT = 2  # cells of background encoded around a tile, then cut off


class LatentComposer:
    """Holds tiles [colours, styles, subjects, TILE, TILE, 16], glyphs and grounds."""

    def __init__(self, renderer: Renderer, encoder: nn.Module) -> None:
        self._renderer, self._encoder = renderer, encoder
        self.device = renderer.device
        start = time.time()
        colours, styles, count = len(COLOUR_NAMES), len(STYLE_NAMES), len(subjects())
        self._colours = torch.arange(colours, device=self.device)
        self._grounds = [
            self._encode(renderer.ground(self._colours, c)).permute(0, 2, 3, 1) for c in range(len(CANVASES))
        ]
        middle = self._grounds[0].shape[1] // 2
        self._plain = self._grounds[0][:, middle, middle]  # [colours, 16], far from every edge
        index = torch.cartesian_prod(*(torch.arange(n) for n in (colours, styles, count)))
        scenes = torch.full((len(index), COLUMNS), -1)
        scenes[:, 0], scenes[:, 1] = LAYOUTS.index("single"), index[:, 2]
        scenes[:, 3], scenes[:, 4] = index[:, 0], index[:, 1]
        x, y = (v // CELL - TILE // 2 for v in geometry(0)[0][LAYOUTS.index("single")][0])
        tiles = self._cut(scenes, y, x, TILE, TILE)
        self._tiles = tiles.unflatten(0, (colours, styles, count))
        index = torch.cartesian_prod(torch.arange(colours), torch.arange(len(spelling.GLYPHS)))
        scenes = torch.full((len(index), COLUMNS), -1)
        scenes[:, 0], scenes[:, 3], scenes[:, 4] = LAYOUTS.index("sign"), index[:, 0], 0
        scenes[:, 6] = index[:, 1]
        top = geometry(0)[1][LAYOUTS.index("sign")] // CELL - 1
        self._glyphs = torch.zeros(len(index), GLYPH_ROWS, GLYPH_COLUMNS, 16, device=self.device)
        latin = index[:, 1] < len(spelling.LATIN)
        for chosen, width in ((latin, spelling.LATIN_WIDTH), (~latin, spelling.HAN_WIDTH)):
            left, columns = (CANVASES[0][0] - width) // 2 // 16 * 2 - 1, width // CELL + 2
            self._glyphs[chosen.to(self.device), :, :columns] = self._cut(
                scenes[chosen], top, left, GLYPH_ROWS, columns
            )
        self._glyphs = self._glyphs.unflatten(0, (colours, -1))
        places = [geometry(c) for c in range(len(CANVASES))]
        corners = torch.tensor([p[0] for p in places]).div(CELL, rounding_mode="floor") - TILE // 2
        self._corners = corners.to(self.device)  # [canvases, layouts, 2, xy] in cells
        self._tops = torch.tensor([p[1] for p in places], device=self.device) // CELL
        print(f"{len(tiles)} tiles, {len(index)} glyphs in {time.time() - start:.0f} s", flush=True)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        return self._encoder(images.float().contiguous(memory_format=torch.channels_last)).float()

    def _cut(self, scenes: Tensor, top: int, left: int, rows: int, columns: int) -> Tensor:
        """Return the difference of the scenes from the background in a window of cells, channels last."""
        span_y = slice((top - CONTEXT) * CELL, (top + rows + CONTEXT) * CELL)
        span_x = slice((left - CONTEXT) * CELL, (left + columns + CONTEXT) * CELL)
        parts = []
        for some in scenes.split(64):
            some = some.to(self.device)
            found = self._encode(self._renderer.compose(some, 0)[:, :, span_y, span_x])
            inner = found[:, :, CONTEXT : CONTEXT + rows, CONTEXT : CONTEXT + columns].permute(0, 2, 3, 1)
            parts.append(inner - self._plain[some[:, 3].long()][:, None, None])
        return torch.cat(parts).contiguous()

    def compose(self, scenes: Tensor, canvas: int) -> Tensor:
        """Return latents [batch, 16, height / 8, width / 8] of scenes [batch, COLUMNS] of one canvas."""
        layout, a, b, colour, style = scenes[:, :5].long().unbind(1)
        latents = self._grounds[canvas][colour].clone()
        corners = self._corners[canvas, layout]
        for number, slot in ((a, 0), (b, 1)):
            where = torch.where((number >= 0)[:, None], corners[:, slot], AWAY)
            self._add(latents, self._tiles, (colour, style, number.clamp(min=0)), where)
        for number, where in self._rows(scenes, canvas):
            self._add(latents, self._glyphs, (colour, number), where)
        return latents.permute(0, 3, 1, 2)

    def _rows(self, scenes: Tensor, canvas: int) -> list[tuple[Tensor, Tensor]]:
        """Return index and corner (x, y in cells) of each glyph of the rows."""
        glyphs = scenes[:, 6:].long()
        length = (glyphs >= 0).sum(1)
        cell = torch.where(glyphs[:, 0] < len(spelling.LATIN), spelling.LATIN_WIDTH, spelling.HAN_WIDTH)
        left = (CANVASES[canvas][0] - length * cell).div(2, rounding_mode="floor") // 16 * 2
        top = self._tops[canvas, scenes[:, 0].long()]
        found = []
        for i in range(spelling.MOST_LETTERS):
            number = glyphs[:, i]
            x = torch.where(number >= 0, left + i * cell // CELL - 1, AWAY)
            found.append((number.clamp(min=0), torch.stack([x, top - 1], dim=1)))
        return found

    def _add(self, latents: Tensor, tiles: Tensor, index: tuple[Tensor, ...], corners: Tensor) -> None:
        """Add each tile at its corner (x, y in cells), clipped to the canvas."""
        height, width = tiles.shape[-3:-1]
        column = torch.arange(latents.shape[2], device=self.device)[None] - corners[:, :1]
        row = torch.arange(latents.shape[1], device=self.device)[None] - corners[:, 1:]
        inside_x, inside_y = (column >= 0) & (column < width), (row >= 0) & (row < height)
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        rows, columns = row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None, :]
        spread = tiles[(*(i[:, None, None] for i in index), rows, columns)]
        latents += spread * inside[..., None]

    def boxes(self, scenes: Tensor, canvas: int) -> Tensor:
        """Return, per token of the canvas, whether it contains a drawing or a glyph."""
        layout, a, b = scenes[:, :3].long().unbind(1)
        width, height = CANVASES[canvas]
        marked = torch.zeros(len(scenes), height // CELL, width // CELL, 1, device=self.device)
        zero = torch.zeros_like(a)
        tile = marked.new_ones(1, TILE, TILE, 1)
        for number, slot in ((a, 0), (b, 1)):
            where = torch.where((number >= 0)[:, None], self._corners[canvas, layout, slot], AWAY)
            self._add(marked, tile, (zero,), where)
        # A Latin glyph's tile is narrower; an extra cell on its right is harmless.
        glyph = marked.new_ones(1, GLYPH_ROWS, spelling.LATIN_WIDTH // CELL + 2, 1)
        for _, where in self._rows(scenes, canvas):
            self._add(marked, glyph, (zero,), where)
        return marked.squeeze(3).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).amax((2, 4)).flatten(1) > 0
