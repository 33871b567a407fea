"""Scores images against the scenes that their prompts describe, with numpy only.

Every figure is a share of right answers:

* ``colour`` — of the palette, the named colour is nearest to the background (the median of the
  border, which no drawing touches);
* ``subject`` — of all subjects in both styles, the named drawing is nearest to the pixels at its
  place, with small shifts allowed; ``subject_pair`` is the same for the halves of a pair,
  ``subject_word`` for a drawing above a word;
* ``glyphs`` — of its script's alphabet and an empty cell, each glyph of the word is nearest to the
  ink in its cell, with small shifts and scales allowed;
* ``style`` — the nearest drawing has the named style;
* ``places`` — of a pair's two orders, the named one fits the image better.

"Nearest" means the least squared difference: in RGB to the drawing on the palette's background, and
for a glyph in coverage, on the line between background and ink.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).with_name("data")
COMPARE = 28  # pixels a side at which drawings are compared
REACH = 16  # largest shift of a drawing, in pixels of the 256 × 256 canvas
SCALES = (0.93, 1.0, 1.07)
GLYPH_REACH = 6  # largest shift of a glyph, in pixels
UNSEEN = "unseen_"  # prefix of figures and kinds of prompts in phrasings outside of the training data
_CANVAS = "256x256"


@dataclass(frozen=True)
class Atlas:
    """Drawings and geometry of the scenes that the checkpoint was trained on."""

    sprites: np.ndarray  # uint8 [styles, subjects, side, side, 4], straight alpha
    hexcodes: list[str]
    styles: list[str]
    colours: dict[str, np.ndarray]  # name → RGB in [0, 1]
    centres: dict[str, dict[str, list[tuple[int, int]]]]  # canvas → layout → centres
    sizes: dict[str, dict[str, int]]
    glyphs: np.ndarray | None = None  # uint8 [alphabet, cell height, widest cell], coverage
    alphabet: str = ""
    cells: dict[str, int] | None = None  # script → cell width; glyphs of narrower cells are left-aligned
    text_tops: dict[str, dict[str, int]] | None = None  # canvas → layout → upper edge of the row

    @staticmethod
    def load(folder: Path = DATA) -> Atlas:
        """Read ``atlas.npz`` and ``scenes.json``."""
        meta = json.loads((folder / "scenes.json").read_text("utf-8"))
        arrays = np.load(folder / "atlas.npz")
        # Older data has one canvas and no glyphs.
        canvases = meta.get("canvases") or {_CANVAS: meta["centres"]}
        text = meta.get("text", {})
        return Atlas(
            sprites=arrays["sprites"],
            hexcodes=meta["hexcodes"],
            styles=meta["styles"],
            colours={k: np.array(v, np.float32) / 255 for k, v in meta["colours"].items()},
            centres={
                canvas: {k: [tuple(p) for p in v] for k, v in layouts.items()} for canvas, layouts in canvases.items()
            },
            sizes=meta["sizes"],
            glyphs=arrays["glyphs"] if text else None,
            alphabet=text.get("alphabet", ""),
            cells=text.get("cells"),
            text_tops=text.get("tops"),
        )

    def places(self, scene: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return the centres of the scene's drawings, in pixels of its canvas."""
        return self.centres[canvas_name(scene)][scene["layout"]][: len(scene["subjects"])]

    def glyph_cells(self, scene: Mapping[str, Any]) -> tuple[list[tuple[int, int]], int]:
        """Return the upper left corners and the cell width of the scene's glyphs; no corners if unknown."""
        word = scene.get("word", "")
        if not word or self.cells is None or self.text_tops is None:
            return [], 0
        cell = self.cells["latin" if word[0].isascii() else "han"]
        left = (scene["width"] - len(word) * cell) // 2 // 16 * 16
        top = self.text_tops[canvas_name(scene)][scene["layout"]]
        return [(left + i * cell, top) for i in range(len(word))], cell


def canvas_name(scene: Mapping[str, Any]) -> str:
    """Return WIDTHxHEIGHT of a scene, 256x256 by default."""
    return f"{scene['width']}x{scene['height']}" if "width" in scene else _CANVAS


def resize(images: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
    """Resize [..., h, w, c] to [..., height, width, c] by exact area averaging."""
    rows = _area_weights(images.shape[-3], height)
    columns = _area_weights(images.shape[-2], width or height)
    out = np.tensordot(images, rows, axes=([-3], [1]))  # [..., w, c, height]
    out = np.tensordot(out, columns, axes=([-3], [1]))  # [..., c, height, width]
    return np.moveaxis(out, -3, -1)


def _area_weights(source: int, target: int) -> np.ndarray:
    """Return [target, source] weights; each row averages the pixels that it covers."""
    edges = np.linspace(0, source, target + 1)
    low = np.maximum(np.arange(source)[None], edges[:-1, None])
    high = np.minimum(np.arange(source)[None] + 1, edges[1:, None])
    cover = np.clip(high - low, 0, None)
    return (cover / cover.sum(1, keepdims=True)).astype(np.float32)


class Judge:
    """Finds what an image shows at the places of a scene."""

    def __init__(self, atlas: Atlas | None = None) -> None:
        self.atlas = atlas or Atlas.load()
        straight = self.atlas.sprites.reshape(-1, *self.atlas.sprites.shape[2:])
        straight = straight.astype(np.float32) / 255
        premultiplied = straight.copy()
        premultiplied[..., :3] *= straight[..., 3:]
        small = resize(premultiplied, COMPARE)
        self._ink = small[..., :3].reshape(len(small), -1)
        self._alpha = np.repeat(small[..., 3:], 3, axis=-1).reshape(len(small), -1)
        self._masks: dict[str, tuple[str, np.ndarray]] = {}  # script → its glyphs and their coverage
        if self.atlas.glyphs is not None:
            for script in ("latin", "han"):
                known = [i for i, g in enumerate(self.atlas.alphabet) if g.isascii() == (script == "latin")]
                masks = self.atlas.glyphs[known].astype(np.float32) / 255
                letters = "".join(self.atlas.alphabet[i] for i in known)
                # The last mask is an empty cell, so that no cell is mistaken for the thinnest letter.
                self._masks[script] = (letters, np.concatenate([masks, np.zeros_like(masks[:1])]))
        self._names = list(self.atlas.colours)
        self._palette = np.stack([self.atlas.colours[n] for n in self._names])
        self._composed: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def background(self, image: np.ndarray) -> str:
        """Return the palette's name of the background."""
        pixels = image.astype(np.float32) / 255
        h = pixels.shape[0]
        m = max(2, h // 32)
        corner = max(4, h // 10)
        parts = [pixels[:m, :corner], pixels[:m, -corner:], pixels[-m:, :corner]]
        parts += [pixels[-m:, -corner:], pixels[:corner, :m].swapaxes(0, 1)]
        border = np.concatenate([p.reshape(-1, 3) for p in parts])
        middle = np.median(border, axis=0)
        return self._names[int(((self._palette - middle) ** 2).sum(1).argmin())]

    def _candidates(self, colour: str) -> tuple[np.ndarray, np.ndarray]:
        """Return every drawing on a background, [n, pixels], and its squared norm."""
        if colour not in self._composed:
            ground = np.tile(self.atlas.colours[colour], COMPARE * COMPARE)
            composed = self._ink + (1 - self._alpha) * ground
            self._composed[colour] = (composed, (composed**2).sum(1))
        return self._composed[colour]

    def distances(self, image: np.ndarray, colour: str, x: int, y: int, size: int) -> np.ndarray:
        """Return the squared error of every drawing near (x, y), [styles, subjects]."""
        pixels = image.astype(np.float32) / 255
        composed, norms = self._candidates(colour)
        least = np.full(len(norms), np.inf, np.float32)
        for scale in SCALES:
            windows = self._windows(pixels, colour, x, y, size * scale)
            errors = norms - 2 * windows @ composed.T + (windows**2).sum(1)[:, None]
            least = np.minimum(least, errors.min(0))
        return least.reshape(self.atlas.sprites.shape[:2])

    def _windows(self, pixels: np.ndarray, colour: str, x: int, y: int, size: float) -> np.ndarray:
        """Return [windows, COMPARE² × 3]: every window within reach of (x, y).

        The image is reduced so that a drawing of ``size`` covers COMPARE pixels and a window is a
        slice. It is padded with background.
        """
        height, width = (round(v * COMPARE / size) for v in pixels.shape[:2])
        cell_y, cell_x = pixels.shape[0] / height, pixels.shape[1] / width
        padded = np.empty((height + 2 * COMPARE, width + 2 * COMPARE, 3), np.float32)
        padded[:] = self.atlas.colours[colour]
        padded[COMPARE:-COMPARE, COMPARE:-COMPARE] = resize(pixels, height, width)
        reach = round(REACH / cell_x)
        left = round((x - size / 2) / cell_x) + COMPARE - reach
        top = round((y - size / 2) / cell_y) + COMPARE - reach
        span = COMPARE + 2 * reach
        region = padded[top : top + span, left : left + span]
        slices = np.lib.stride_tricks.sliding_window_view(region, (COMPARE, COMPARE), (0, 1))
        return np.moveaxis(slices, 2, -1).reshape(-1, COMPARE * COMPARE * 3)

    def read_glyphs(self, image: np.ndarray, scene: Mapping[str, Any]) -> list[str]:
        """Return what is written in each cell of the scene's row; an empty string for an empty cell."""
        corners, cell = self.atlas.glyph_cells(scene)
        if not corners:
            return []
        ground = self.atlas.colours[scene["colour"]]
        ink = np.full(3, 0.96 if ground @ np.array([0.3, 0.59, 0.11], np.float32) < 0.45 else 0.06, np.float32)
        axis = ink - ground
        cover = ((image.astype(np.float32) / 255 - ground) @ axis / (axis @ axis)).clip(0, 1)
        letters, masks = self._masks["latin" if cell < masks_width(self.atlas) else "han"]
        height, found = masks.shape[1], []
        half = height // 2
        small = resize(masks[..., :cell, None], half, cell // 2)[..., 0]  # compared at half resolution
        norms = (small**2).sum((1, 2))
        for left, top in corners:
            least = np.full(len(masks), np.inf, np.float32)
            for scale in SCALES:
                rows, columns = round(image.shape[0] / scale / 2), round(image.shape[1] / scale / 2)
                reduced = np.pad(resize(cover[..., None], rows, columns)[..., 0], GLYPH_REACH)
                x = round((left + cell / 2) / image.shape[1] * columns - cell / 4)
                y = round((top + height / 2) / image.shape[0] * rows - height / 4)
                reach = GLYPH_REACH // 2
                x, y = x + GLYPH_REACH - reach, y + GLYPH_REACH - reach
                region = reduced[max(y, 0) : y + half + 2 * reach, max(x, 0) : x + cell // 2 + 2 * reach]
                windows = np.lib.stride_tricks.sliding_window_view(region, small.shape[1:])
                flat = windows.reshape(-1, small[0].size)
                errors = norms - 2 * flat @ small.reshape(len(small), -1).T + (flat**2).sum(1)[:, None]
                least = np.minimum(least, errors.min(0))
            best = int(least.argmin())
            found.append(letters[best] if best < len(letters) else "")
        return found

    def score(self, image: np.ndarray, scene: Mapping[str, Any]) -> dict[str, list[bool]]:
        """Judge an image, uint8 [height, width, 3]; return the answers by figure."""
        colour, layout = scene["colour"], scene["layout"]
        answers = {"colour": [self.background(image) == colour]}
        read = self.read_glyphs(image, scene)
        if read:
            answers["glyphs"] = [a == b for a, b in zip(read, scene["word"], strict=True)]
        wanted = [self.atlas.hexcodes.index(h) for h in scene["subjects"]]
        if not wanted:
            return answers
        style = self.atlas.styles.index(scene["style"])
        size = self.atlas.sizes[layout][scene["size"]]
        tables = [self.distances(image, colour, x, y, size) for x, y in self.atlas.places(scene)]
        nearest = [np.unravel_index(t.argmin(), t.shape) for t in tables]
        kind = {"single": "subject", "word": "subject_word"}.get(layout, "subject_pair")
        answers[kind] = [bool(n[1] == w) for n, w in zip(nearest, wanted, strict=True)]
        answers["style"] = [bool(n[0] == style) for n in nearest]
        if len(wanted) == 2:
            a, b = wanted
            said = tables[0][style, a] + tables[1][style, b]
            swapped = tables[0][style, b] + tables[1][style, a]
            answers["places"] = [bool(said < swapped)]
        return answers


def masks_width(atlas: Atlas) -> int:
    """Return the width of the widest cell."""
    return 0 if atlas.glyphs is None else int(atlas.glyphs.shape[2])


def summarise(
    judged: Sequence[tuple[Mapping[str, Any], dict[str, list[bool]]]],
) -> dict[str, float]:
    """Return the share of each figure: overall, by language, by canvas, and for unseen phrasings.

    Prompts in unseen phrasings, and those of canvases other than 256 × 256, only count in figures
    of their own.
    """
    gathered: dict[str, list[bool]] = {}
    for prompt, answers in judged:
        canvas = canvas_name(prompt["scene"])
        for name, values in answers.items():
            if canvas != _CANVAS:
                names = [f"{name}_{canvas}"]
            elif prompt.get("unseen"):
                names = [f"{UNSEEN}{name}", f"{UNSEEN}{name}_{prompt['language']}"]
            else:
                names = [name, f"{name}_{prompt['language']}"]
            for key in names:
                gathered.setdefault(key, []).extend(values)
    order = ("colour", "places", "subject", "subject_pair", "subject_word", "style", "glyphs")

    def rank(name: str) -> tuple[bool, bool, int, str]:
        base = name.removeprefix(UNSEEN)
        known = [i for i, o in enumerate(order) if base == o or base.startswith(f"{o}_")]
        return ("x" in name.rpartition("_")[2], base != name, known[-1] if known else len(order), name)

    return {name: float(np.mean(gathered[name])) for name in sorted(gathered, key=rank)}
