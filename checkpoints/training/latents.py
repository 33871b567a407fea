"""Compose scenes in latent space.

The drawings stand on a grid of latent cells and the tiny encoder sees only its neighbourhood: the
latents of a scene are those of the plain background with each drawing's own tile laid over. Tiles
are encoded once for each drawing, colour and style; any number of scenes then costs nothing.
"""

from __future__ import annotations

import time

import torch
from phrases import COLOUR_NAMES, STYLE_NAMES, WORDS
from render import Renderer
from scenes import CENTRES, LAYOUTS, PAIR_SIZE, SINGLE_SIZES, WORD_SUBJECT_SIZE, subjects
from torch import Tensor, nn

CELL = 8  # pixels
TILE = 16  # cells a side: a drawing of 112 pixels and one cell around it
SIDE = 32
CONTEXT = 2  # cells of background encoded around a tile, then cut off
if {PAIR_SIZE, WORD_SUBJECT_SIZE, SINGLE_SIZES["medium"]} != {CELL * (TILE - 2)}:
    raise ValueError("tiles hold one size of drawing")


class LatentComposer:
    """Holds tiles [colours, styles, subjects, 16, TILE, TILE], grounds and written words."""

    def __init__(self, renderer: Renderer, encoder: nn.Module) -> None:
        self._renderer, self._encoder = renderer, encoder
        self.device = renderer.device
        start = time.time()
        colours, styles, count = len(COLOUR_NAMES), len(STYLE_NAMES), len(subjects())
        index = torch.cartesian_prod(*(torch.arange(n) for n in (colours, styles, count)))
        zero = torch.zeros(len(index), dtype=torch.long)
        scenes = torch.stack([zero, index[:, 2], zero - 1, index[:, 0], index[:, 1], zero + 1, zero - 1], dim=1)
        low = CELL * (SIDE // 2 - TILE // 2 - CONTEXT)
        span = slice(low, low + CELL * (TILE + 2 * CONTEXT))
        tiles = self._encode(scenes, (span, span))
        inner = slice(CONTEXT, CONTEXT + TILE)
        self._tiles = tiles[:, :, inner, inner].unflatten(0, (colours, styles, count)).contiguous()
        # A ground is what remains of a picture whose drawing is pushed out of sight.
        colour = torch.arange(colours)
        zero, away = torch.zeros_like(colour), torch.full((colours, 4), 9999)
        plain = torch.stack([zero, zero, zero - 1, colour, zero, zero + 1, zero - 1], dim=1)
        everything = (slice(None), slice(None))
        self._grounds = self._encode(plain, everything, away)
        index = torch.cartesian_prod(colour, torch.arange(len(WORDS)))
        zero = torch.zeros(len(index), dtype=torch.long)
        word_layout = zero + LAYOUTS.index("word")
        written = torch.stack([word_layout, zero, zero - 1, index[:, 0], zero, zero + 1, index[:, 1]], dim=1)
        away = torch.tensor([9999, 9999, 0, 0]).expand(len(index), 4)
        written = self._encode(written, everything, away)
        self._written = written.unflatten(0, (colours, len(WORDS)))
        centres = [(CENTRES[n] + [(0, 0)])[:2] for n in LAYOUTS]
        corner = torch.tensor(centres) // CELL - TILE // 2
        self._corners = corner.to(self.device)  # [layouts, 2, xy] in cells
        print(
            f"{len(tiles)} tiles in {time.time() - start:.0f} s, mean {self._tiles.mean():.3f}, "
            f"deviation {self._tiles.std():.3f}",
            flush=True,
        )

    @torch.no_grad()
    def _encode(self, scenes: Tensor, window: tuple[slice, slice], jitter: Tensor | None = None) -> Tensor:
        """Render, cut the window out and encode."""
        jitter = torch.zeros(len(scenes), 4, dtype=torch.long) if jitter is None else jitter
        parts = []
        for s, j in zip(scenes.split(32), jitter.split(32), strict=True):
            x = self._renderer.compose(s.to(self.device), j.to(self.device)).float()
            x = x[:, :, window[0], window[1]].contiguous(memory_format=torch.channels_last)
            parts.append(self._encoder(x).float())
        return torch.cat(parts)

    def compose(self, scenes: Tensor, jitter: Tensor) -> Tensor:
        """Return latents [batch, 16, 32, 32] of scenes [batch, 7] with jitter [batch, 4]."""
        layout, a, b, colour, style, _, word = scenes.long().unbind(1)
        shift = jitter.long().div(CELL, rounding_mode="floor").unflatten(1, (2, 2))
        corners = self._corners[layout] + shift
        has_word = (word >= 0)[:, None, None, None]
        written = self._written[colour, word.clamp(min=0)]
        canvas = torch.where(has_word, written, self._grounds[colour])
        canvas = self._lay(canvas, self._tiles[colour, style, a], corners[:, 0])
        laid = self._lay(canvas, self._tiles[colour, style, b.clamp(min=0)], corners[:, 1])
        return torch.where((b >= 0)[:, None, None, None], laid, canvas)

    def _lay(self, canvas: Tensor, tiles: Tensor, corners: Tensor) -> Tensor:
        """Lay each tile at its corner (x, y in cells); what falls outside is lost."""
        cells = torch.arange(SIDE, device=self.device)
        column = cells[None] - corners[:, :1]
        row = cells[None] - corners[:, 1:]
        inside_x, inside_y = (column >= 0) & (column < TILE), (row >= 0) & (row < TILE)
        inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        batch = torch.arange(len(tiles), device=self.device)[:, None, None]
        rows, columns = row.clamp(0, TILE - 1), column.clamp(0, TILE - 1)
        spread = tiles[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return torch.where(inside, spread, canvas)

    def boxes(self, scenes: Tensor, jitter: Tensor) -> Tensor:
        """Return, for each of the 256 tokens, whether a drawing or a word stands there."""
        layout, b, word = scenes[:, 0].long(), scenes[:, 2], scenes[:, 6]
        blank = torch.zeros(len(scenes), 1, SIDE, SIDE, device=self.device)
        tile = torch.ones(len(scenes), 1, TILE, TILE, device=self.device)
        shift = jitter.long().div(CELL, rounding_mode="floor").unflatten(1, (2, 2))
        corners = self._corners[layout] + shift
        marked = self._lay(blank, tile, corners[:, 0])
        both = self._lay(marked, tile, corners[:, 1])
        marked = torch.where((b >= 0)[:, None, None, None], both, marked)
        strip = blank.clone()
        strip[:, :, 22:30, 2:30] = 1
        marked = torch.where((word >= 0)[:, None, None, None], marked.maximum(strip), marked)
        return marked.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5)).flatten(1) > 0
