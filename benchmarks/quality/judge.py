"""Score pictures against the scenes that their prompts describe. numpy only.

Every figure is a share of right answers:

* ``colour`` — the background (median of the border that no drawing touches) is nearest to the
  colour named, among the palette;
* ``subject`` — the drawing named is, of all subjects in both styles, the one nearest to the pixels
  where it should stand (small shifts allowed); ``subject_pair`` is the same for a pair's halves,
  ``subject_word`` for a drawing with a word under it;
* ``style`` — the nearest drawing's style is the one named;
* ``places`` — of a pair's two orders, the one named explains the picture better.

"Nearest" is the squared difference in RGB to the drawing composed on the palette's background.
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
REACH = 16  # pixels of the 256 × 256 canvas by which a drawing may be off its place
SCALES = (0.93, 1.0, 1.07)


@dataclass(frozen=True)
class Atlas:
    """The drawings and the scenes' geometry, as the checkpoint was trained on them."""

    sprites: np.ndarray  # uint8 [styles, subjects, side, side, 4], straight alpha
    hexcodes: list[str]
    styles: list[str]
    colours: dict[str, np.ndarray]  # name → RGB in [0, 1]
    centres: dict[str, list[tuple[int, int]]]
    sizes: dict[str, dict[str, int]]

    @staticmethod
    def load(folder: Path = DATA) -> Atlas:
        """Read ``atlas.npz`` and ``scenes.json``."""
        meta = json.loads((folder / "scenes.json").read_text("utf-8"))
        sheet = np.load(folder / "atlas.npz")["sprites"]
        return Atlas(
            sprites=sheet,
            hexcodes=meta["hexcodes"],
            styles=meta["styles"],
            colours={k: np.array(v, np.float32) / 255 for k, v in meta["colours"].items()},
            centres={k: [tuple(p) for p in v] for k, v in meta["centres"].items()},
            sizes=meta["sizes"],
        )


def resize(images: np.ndarray, side: int) -> np.ndarray:
    """Average [..., h, h, c] down (or repeat up) to [..., side, side, c] by exact area."""
    weights = _area_weights(images.shape[-3], side)
    out = np.tensordot(images, weights, axes=([-3], [1]))  # [..., w, c, side]
    out = np.tensordot(out, weights, axes=([-3], [1]))  # [..., c, side, side]
    return np.moveaxis(out, -3, -1)


def _area_weights(source: int, target: int) -> np.ndarray:
    """Return [target, source] weights; each row averages the pixels that it covers."""
    edges = np.linspace(0, source, target + 1)
    low = np.maximum(np.arange(source)[None], edges[:-1, None])
    high = np.minimum(np.arange(source)[None] + 1, edges[1:, None])
    cover = np.clip(high - low, 0, None)
    return (cover / cover.sum(1, keepdims=True)).astype(np.float32)


class Judge:
    """Answers, for a picture and a scene, what the picture shows where."""

    def __init__(self, atlas: Atlas | None = None) -> None:
        self.atlas = atlas or Atlas.load()
        straight = self.atlas.sprites.reshape(-1, *self.atlas.sprites.shape[2:])
        straight = straight.astype(np.float32) / 255
        premultiplied = straight.copy()
        premultiplied[..., :3] *= straight[..., 3:]
        small = resize(premultiplied, COMPARE)
        self._ink = small[..., :3].reshape(len(small), -1)
        self._alpha = np.repeat(small[..., 3:], 3, axis=-1).reshape(len(small), -1)
        self._names = list(self.atlas.colours)
        self._palette = np.stack([self.atlas.colours[n] for n in self._names])
        self._composed: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def background(self, image: np.ndarray) -> str:
        """Return the palette's name of the background."""
        picture = image.astype(np.float32) / 255
        h = picture.shape[0]
        m = max(2, h // 32)
        corner = max(4, h // 10)
        parts = [picture[:m, :corner], picture[:m, -corner:], picture[-m:, :corner]]
        parts += [picture[-m:, -corner:], picture[:corner, :m].swapaxes(0, 1)]
        pixels = np.concatenate([p.reshape(-1, 3) for p in parts])
        middle = np.median(pixels, axis=0)
        return self._names[int(((self._palette - middle) ** 2).sum(1).argmin())]

    def _candidates(self, colour: str) -> tuple[np.ndarray, np.ndarray]:
        """Return every drawing on that background [n, pixels] and its squared norms."""
        if colour not in self._composed:
            ground = np.tile(self.atlas.colours[colour], COMPARE * COMPARE)
            composed = self._ink + (1 - self._alpha) * ground
            self._composed[colour] = (composed, (composed**2).sum(1))
        return self._composed[colour]

    def distances(self, image: np.ndarray, colour: str, x: int, y: int, size: int) -> np.ndarray:
        """Return the squared error of every drawing near (x, y) [styles, subjects]."""
        picture = image.astype(np.float32) / 255
        composed, norms = self._candidates(colour)
        least = np.full(len(norms), np.inf, np.float32)
        for scale in SCALES:
            windows = self._windows(picture, colour, x, y, size * scale)
            errors = norms - 2 * windows @ composed.T + (windows**2).sum(1)[:, None]
            least = np.minimum(least, errors.min(0))
        return least.reshape(self.atlas.sprites.shape[:2])

    def _windows(self, picture: np.ndarray, colour: str, x: int, y: int, size: float) -> np.ndarray:
        """Return [windows, COMPARE² × 3]: every window within reach of (x, y).

        The picture is averaged down so that a drawing of ``size`` covers COMPARE pixels; a window
        is then a slice. Beyond the picture's edge there is background.
        """
        side = round(256 * COMPARE / size)
        cell = 256 / side
        padded = np.empty((side + 2 * COMPARE, side + 2 * COMPARE, 3), np.float32)
        padded[:] = self.atlas.colours[colour]
        padded[COMPARE:-COMPARE, COMPARE:-COMPARE] = resize(picture, side)
        reach = round(REACH / cell)
        left, top = (round((v - size / 2) / cell) + COMPARE - reach for v in (x, y))
        span = COMPARE + 2 * reach
        region = padded[top : top + span, left : left + span]
        slices = np.lib.stride_tricks.sliding_window_view(region, (COMPARE, COMPARE), (0, 1))
        return np.moveaxis(slices, 2, -1).reshape(-1, COMPARE * COMPARE * 3)

    def score(self, image: np.ndarray, scene: Mapping[str, Any]) -> dict[str, list[bool]]:
        """Judge one picture, uint8 [h, h, 3]; return the answers to each question it answers."""
        colour, layout = scene["colour"], scene["layout"]
        style = self.atlas.styles.index(scene["style"])
        size = self.atlas.sizes[layout][scene["size"]]
        wanted = [self.atlas.hexcodes.index(h) for h in scene["subjects"]]
        centres = self.atlas.centres[layout][: len(wanted)]
        tables = [self.distances(image, colour, x, y, size) for x, y in centres]
        nearest = [np.unravel_index(t.argmin(), t.shape) for t in tables]
        right = [bool(n[1] == w) for n, w in zip(nearest, wanted, strict=True)]
        kind = {"single": "subject", "word": "subject_word"}.get(layout, "subject_pair")
        answers = {
            "colour": [self.background(image) == colour],
            kind: right,
            "style": [bool(n[0] == style) for n in nearest],
        }
        if len(wanted) == 2:
            a, b = wanted
            said = tables[0][style, a] + tables[1][style, b]
            swapped = tables[0][style, b] + tables[1][style, a]
            answers["places"] = [bool(said < swapped)]
        return answers


def summarise(
    judged: Sequence[tuple[Mapping[str, Any], dict[str, list[bool]]]],
) -> dict[str, float]:
    """Return each figure's share, overall, by language, and for the unseen phrasings.

    The prompts in unseen phrasings count in their own figures alone.
    """
    gathered: dict[str, list[bool]] = {}
    for prompt, answers in judged:
        for name, values in answers.items():
            if prompt.get("unseen"):
                gathered.setdefault(f"unseen_{name}", []).extend(values)
                continue
            gathered.setdefault(name, []).extend(values)
            gathered.setdefault(f"{name}_{prompt['language']}", []).extend(values)
    order = ("colour", "places", "subject", "subject_pair", "subject_word", "style")

    def rank(name: str) -> tuple[int, int, str]:
        base = name.removeprefix("unseen_")
        known = [i for i, o in enumerate(order) if base == o or base.startswith(f"{o}_")]
        return (name.startswith("unseen_"), known[-1] if known else len(order), name)

    return {name: float(np.mean(gathered[name])) for name in sorted(gathered, key=rank)}
