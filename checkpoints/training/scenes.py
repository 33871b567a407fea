"""Scenes: the content of an image, its places, and the combinations that are never trained.

A scene is a small record of indices that determines its image. A caption should nearly do so as
well, otherwise eight evaluations cannot draw it sharply.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import spelling
from phrases import COLOUR_NAMES, STYLE_NAMES

# Number of subjects; trial runs of the scripts use few.
SUBJECTS_IN_USE = int(os.environ.get("NANO_SUBJECTS", "306"))
CANVASES = [(256, 256), (192, 320), (320, 192), (384, 384)]  # width, height
CANVAS_SHARES = [0.7, 0.1, 0.1, 0.1]
LAYOUTS = ["single", "left_right", "top_bottom", "word", "sign"]
LAYOUT_SHARES = [0.26, 0.27, 0.27, 0.14, 0.06]
PLACES = {
    "single": ["centre"],
    "left_right": ["left", "right"],
    "top_bottom": ["top", "bottom"],
    "word": ["centre"],
    "sign": [],
}
DRAWING = 112  # side in pixels
TEXT_ROOM = 32  # least margin of a row of glyphs in pixels, both sides together
HELD_OUT_ONE_IN = 10
COLUMNS = 6 + spelling.MOST_LETTERS  # of a scene's record


@dataclass(frozen=True)
class Subject:
    """A subject that can be drawn, with its names."""

    hexcode: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    measure: str


def subjects() -> tuple[Subject, ...]:
    """Return the subjects that scenes are made of."""
    return all_subjects()[:SUBJECTS_IN_USE]


@functools.cache
def all_subjects() -> tuple[Subject, ...]:
    """Return the curated subjects of ``subjects.tsv``, in file order."""
    rows = []
    for line in Path(__file__).with_name("subjects.tsv").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            code, english, chinese, measure = line.split("\t")
            rows.append(Subject(code, tuple(english.split(";")), tuple(chinese.split(";")), measure))
    return tuple(rows)


def centres(layout: str, width: int, height: int) -> list[tuple[int, int]]:
    """Return the centres of the drawings in pixels; empty if the layout has none or does not fit.

    Every drawing's corner is at 8 modulo 16 (a latent is 8 pixels and a token 16), so a drawing has
    the same latents at every place, and the model learns one pattern instead of dozens.
    """
    x, y = width // 2, height // 2
    if layout == "single":
        return [(x, y)]
    if layout == "left_right":
        return [(width // 4, y), (3 * width // 4, y)] if width >= 2 * DRAWING + 16 else []
    if layout == "top_bottom":
        return [(x, height // 4), (x, 3 * height // 4)] if height >= 2 * DRAWING + 16 else []
    return [(x, (height - 192) // 2 + 64)] if layout == "word" else []


def text_top(layout: str, height: int) -> int:
    """Return the upper edge of the row of glyphs, a multiple of 16."""
    if layout == "sign":
        return height // 2 - 32
    return min((height - 192) // 2 + 144, height - 64)


def text_left(length: int, cell: int, width: int) -> int:
    """Return the left edge of the row of glyphs: a multiple of 16, at most 8 left of centred."""
    return (width - length * cell) // 2 // 16 * 16


def layouts_of(canvas: int) -> tuple[list[str], list[float]]:
    """Return the layouts that fit a canvas, and their shares."""
    fitting = [n == "sign" or bool(centres(n, *CANVASES[canvas])) for n in LAYOUTS]
    names = [n for n, fits in zip(LAYOUTS, fitting, strict=True) if fits]
    return names, [s for s, fits in zip(LAYOUT_SHARES, fitting, strict=True) if fits]


@dataclass(frozen=True)
class Scene:
    """Indices into the tables; ``a`` and ``b`` are −1 and ``text`` is empty if the layout has none."""

    layout: int
    a: int
    b: int
    colour: int
    style: int
    canvas: int
    text: str = ""

    @property
    def layout_name(self) -> str:
        return LAYOUTS[self.layout]

    def as_names(self) -> dict[str, object]:
        """Return the scene with names instead of indices, for the judge."""
        width, height = CANVASES[self.canvas]
        spec: dict[str, object] = {
            "layout": self.layout_name,
            "subjects": [subjects()[i].hexcode for i in (self.a, self.b) if i >= 0],
            "colour": COLOUR_NAMES[self.colour],
            "style": STYLE_NAMES[self.style],
            "size": "medium",
            "width": width,
            "height": height,
        }
        return spec | ({"word": self.text} if self.text else {})

    def as_row(self) -> list[int]:
        numbers = spelling.glyph_numbers(self.text)
        return [self.layout, self.a, self.b, self.colour, self.style, self.canvas, *numbers]


@functools.cache
def is_held_out(subject: int, colour: int, style: int, place: str) -> bool:
    """Tell by a stable hash whether a combination is held out for the judge."""
    name = f"{subjects()[subject].hexcode}|{COLOUR_NAMES[colour]}|{STYLE_NAMES[style]}|{place}"
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def scene_held_out(scene: Scene, every: bool = False) -> bool:
    """Tell whether the combination of any (with ``every``: each) subject is held out."""
    drawn = [i for i in (scene.a, scene.b) if i >= 0]
    places = PLACES[scene.layout_name]
    found = [is_held_out(s, scene.colour, scene.style, p) for s, p in zip(drawn, places, strict=True)]
    return all(found) if every else any(found)


def draw_scene(rng: random.Random, canvas: int, layout: str | None = None, held_out: bool = False) -> Scene:
    """Draw a scene without regard to the split of subjects; the text is of the given side of the split."""
    layout = layout or rng.choices(*layouts_of(canvas))[0]
    count = len(subjects())
    drawn = len(PLACES[layout])
    a = rng.randrange(count) if drawn else -1
    b = -1
    if drawn == 2:
        b = rng.randrange(count - 1)
        b += b >= a  # two different subjects, otherwise the judge could not detect a swap
    text = ""
    if layout in ("word", "sign"):
        text = spelling.draw_text(rng, CANVASES[canvas][0] - TEXT_ROOM, held_out)
    return Scene(
        layout=LAYOUTS.index(layout),
        a=a,
        b=b,
        colour=rng.randrange(len(COLOUR_NAMES)),
        style=rng.randrange(len(STYLE_NAMES)) if drawn else 0,
        canvas=canvas,
        text=text,
    )


def training_scene(rng: random.Random) -> Scene:
    """Draw a scene in which no subject's combination and no word is held out."""
    canvas = rng.choices(range(len(CANVASES)), CANVAS_SHARES)[0]
    while True:
        scene = draw_scene(rng, canvas)
        if not scene_held_out(scene):
            return scene


def held_out_scene(rng: random.Random, layout: str, canvas: int = 0) -> Scene:
    """Draw a scene in which every subject's combination, and the word, is held out."""
    while True:
        scene = draw_scene(rng, canvas, layout, held_out=True)
        if scene_held_out(scene, every=True):
            return scene
