"""Scenes: what a picture shows, where it stands, and which combinations are never trained.

A scene is a small record of indices. Everything the picture needs beyond it is a few pixels of
jitter: a caption should nearly determine its picture, or eight evaluations cannot draw it sharply.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from phrases import COLOUR_NAMES, SIZE_NAMES, STYLE_NAMES, WORDS

CANVAS = 256
# How many of the subjects are drawn. All 306 need a GPU; two CPU cores teach this many in an hour.
SUBJECTS_IN_USE = 40
LAYOUTS = ["single", "left_right", "top_bottom", "word"]
LAYOUT_SHARES = [0.28, 0.32, 0.32, 0.08]
# Layout → centres (x, y) of what is drawn, in pixels of the 256 × 256 canvas. With the sizes below,
# every drawing's corner falls on 8 modulo 16: a latent is 8 pixels and a token 16, so a drawing
# has the same latents wherever it stands, and there is one pattern to learn a size, not dozens.
CENTRES = {
    "single": [(128, 128)],
    "left_right": [(64, 128), (192, 128)],
    "top_bottom": [(128, 64), (128, 192)],
    "word": [(128, 96), (128, 208)],
}
PLACES = {
    "single": ["centre"],
    "left_right": ["left", "right"],
    "top_bottom": ["top", "bottom"],
    "word": ["centre"],
}
SINGLE_SIZES = {"small": 80, "medium": 112, "large": 176}
SINGLE_SIZE_SHARES = [0.0, 1.0, 0.0]  # every size is one more pattern a drawing to learn
PAIR_SIZE = 112
WORD_SUBJECT_SIZE = 112
# Shifts along each axis in pixels, whole latent cells for the same reason, and their shares.
JITTER = ([-8, 0, 8], [0.04, 0.92, 0.04])
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Subject:
    """One thing that can be drawn, with its names."""

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


@dataclass(frozen=True)
class Scene:
    """Indices into the tables; ``b`` and ``word`` are −1 where the layout has none."""

    layout: int
    a: int
    b: int
    colour: int
    style: int
    size: int
    word: int

    @property
    def layout_name(self) -> str:
        return LAYOUTS[self.layout]

    def as_names(self) -> dict[str, object]:
        """Spell the scene out for a reader that does not have these tables."""
        spec: dict[str, object] = {
            "layout": self.layout_name,
            "subjects": [subjects()[i].hexcode for i in (self.a, self.b) if i >= 0],
            "colour": COLOUR_NAMES[self.colour],
            "style": STYLE_NAMES[self.style],
            "size": SIZE_NAMES[self.size],
        }
        if self.word >= 0:
            spec["word"] = WORDS[self.word]
        return spec

    def as_tuple(self) -> tuple[int, ...]:
        return tuple(asdict(self).values())


@functools.cache
def is_held_out(subject: int, colour: int, style: int, place: str) -> bool:
    """Tell by a stable hash whether this combination belongs to the judge alone."""
    name = f"{subjects()[subject].hexcode}|{COLOUR_NAMES[colour]}|{STYLE_NAMES[style]}|{place}"
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def scene_held_out(scene: Scene, every: bool = False) -> bool:
    """Tell whether any (or, with ``every``, each) subject's combination is held out."""
    drawn = [scene.a] + ([scene.b] if scene.b >= 0 else [])
    places = PLACES[scene.layout_name]
    found = [is_held_out(s, scene.colour, scene.style, p) for s, p in zip(drawn, places, strict=True)]
    return all(found) if every else any(found)


def draw_scene(rng: random.Random, layout: str | None = None) -> Scene:
    """Draw one scene without regard to the split."""
    layout = layout or rng.choices(LAYOUTS, LAYOUT_SHARES)[0]
    count = len(subjects())
    a = rng.randrange(count)
    b = -1
    if layout in ("left_right", "top_bottom"):
        b = rng.randrange(count - 1)
        b += b >= a  # never the same subject twice: the judge could not see a swap
    return Scene(
        layout=LAYOUTS.index(layout),
        a=a,
        b=b,
        colour=rng.randrange(len(COLOUR_NAMES)),
        style=rng.randrange(len(STYLE_NAMES)),
        size=rng.choices(range(3), SINGLE_SIZE_SHARES)[0] if layout == "single" else 1,
        word=rng.randrange(len(WORDS)) if layout == "word" else -1,
    )


def training_scene(rng: random.Random) -> Scene:
    """Draw a scene in which no subject's combination is held out."""
    while True:
        scene = draw_scene(rng)
        if not scene_held_out(scene):
            return scene


def held_out_scene(rng: random.Random, layout: str) -> Scene:
    """Draw a scene in which every subject's combination is held out."""
    while True:
        scene = draw_scene(rng, layout)
        if scene_held_out(scene, every=True):
            return scene


def draw_jitter(rng: random.Random) -> list[int]:
    """Return (dx, dy) of slot A and of slot B or the word, as four numbers."""
    return rng.choices(*JITTER, k=4)


def placement(scene: Scene) -> list[tuple[int, int, int]]:
    """Return (x, y, size) of each subject before jitter."""
    if scene.layout_name == "single":
        size = SINGLE_SIZES[SIZE_NAMES[scene.size]]
    else:
        size = WORD_SUBJECT_SIZE if scene.layout_name == "word" else PAIR_SIZE
    count = 2 if scene.b >= 0 else 1
    return [(x, y, size) for x, y in CENTRES[scene.layout_name][:count]]
