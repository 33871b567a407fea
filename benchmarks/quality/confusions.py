"""Finds subjects that look alike: for every drawing, the nearest drawing of another subject.

    python -m zimage_rt.benchmarks.quality.confusions
    python -m zimage_rt.benchmarks.quality.confusions --bundle engines/nano --out confusions.md --sheet confusions.png

Two measures, each 0 for identical images and 1 for orthogonal ones:

* ``pixels``: the judge's distance, RGB at 28 × 28 pixels with small shifts and scales;
* ``look``: CIELAB at 16 × 16 pixels and edges by direction in 8 × 8 cells, invariant to mirroring. It shares only the
  drawings with the judge.

Without a bundle the reference drawings are compared with each other. With a bundle, each subject is drawn in each
style, two side by side per image, and compared with all drawings including its own. ``--unlabelled`` writes the
drawings in shuffled order with numbers, for a person to name.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from zimage_rt.benchmarks.quality.judge import COMPARE, DATA, Atlas, Judge, resize
from zimage_rt.benchmarks.systems.base import System, load_system

from zimage_rt.image.contact_sheet import Section, SheetImage, draw_sheet

STYLE_WORDS = {"noto": "classic", "flat": "flat"}
CANVAS, PLACE = 256, (128, 128)  # centre of a single drawing
LOOK_SIDE = 48  # side of a drawing in the look measure in pixels, before averaging
CELLS, DIRECTIONS, COLOUR_SIDE = 8, 6, 16
SHEET_CELL, SHEET_COLUMNS, SHEET_ROWS = 96, 12, 9


@dataclass(frozen=True)
class Nearest:
    """The nearest drawing of another subject, its distance, and that of the image's own drawing."""

    subject: int
    style: int
    other: float
    own: float


@dataclass(frozen=True)
class Finding:
    """Results of both measures for an image of a subject."""

    subject: int
    style: int
    pixels: Nearest
    look: Nearest

    @property
    def difference(self) -> float:
        """The mean of both measures' distances to the nearest other drawing."""
        return (self.pixels.other + self.look.other) / 2


def compose(atlas: Atlas, style: int, subject: int, colour: str) -> np.ndarray:
    """Return a subject's reference drawing in the middle of a canvas, uint8 [256, 256, 3]."""
    size = atlas.sizes["single"]["medium"]
    sprite = atlas.sprites[style, subject].astype(np.float32) / 255
    sprite[..., :3] *= sprite[..., 3:]
    small = resize(sprite, size)
    image = np.tile(atlas.colours[colour], (CANVAS, CANVAS, 1))
    left, top = (v - size // 2 for v in PLACE)
    place = image[top : top + size, left : left + size]
    place[:] = small[..., :3] + (1 - small[..., 3:]) * place
    return np.rint(image * 255).clip(0, 255).astype(np.uint8)


def window(atlas: Atlas, image: np.ndarray) -> np.ndarray:
    """Return the part of an image that contains the drawing, uint8 [size, size, 3]."""
    size = atlas.sizes["single"]["medium"]
    left, top = (v - size // 2 for v in PLACE)
    return image[top : top + size, left : left + size]


def lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 1] to CIELAB (D65), the last axis being the channels."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ (matrix / matrix.sum(1, keepdims=True)).T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def look_features(images: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of the look measure.

    Args:
        images: RGB in [0, 1], [n, h, w, 3], each cropped to a drawing.
        ground: the background's RGB in [0, 1].

    Returns:
        The colours' difference from the background [n, 16, 16, 3], and the edges' strength by direction [n, 8, 8, 6].
    """
    colours = lab(resize(images, LOOK_SIDE)) - lab(ground)
    down, across = np.gradient(colours[..., 0], axis=(1, 2))
    strength = np.hypot(down, across)
    direction = (np.arctan2(down, across) % np.pi) / np.pi * DIRECTIONS
    # Each edge is split between the two nearest directions.
    gap = np.abs(direction[..., None] - np.arange(DIRECTIONS, dtype=np.float32))
    share = (1 - np.minimum(gap, DIRECTIONS - gap)).clip(0)
    return resize(colours, COLOUR_SIDE), resize(strength[..., None] * share, CELLS)


def mirrored(colours: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the look features of the same images mirrored left to right: direction k becomes −k."""
    return colours[:, :, ::-1], edges[:, :, ::-1, -np.arange(DIRECTIONS) % DIRECTIONS]


def relative_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return |a − b| / √(|a|² + |b|²) of every pair, [len(a), len(b)]: 0 the same, 1 orthogonal."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)
    return np.sqrt((1 - 2 * (a @ b.T) / np.maximum(squares, 1e-12)).clip(0))


class Measures:
    """Both measures against the 612 drawings on one background."""

    def __init__(self, atlas: Atlas, colour: str = "white") -> None:
        self.atlas, self.colour = atlas, colour
        self._judge = Judge(atlas)
        ground = atlas.colours[colour]
        drawings = atlas.sprites.reshape(-1, *atlas.sprites.shape[2:]).astype(np.float32) / 255
        drawings[..., :3] *= drawings[..., 3:]
        small = resize(drawings, LOOK_SIDE)
        references = small[..., :3] + (1 - small[..., 3:]) * ground
        self._energy = self._pixel_energy(references).reshape(atlas.sprites.shape[:2])
        features = look_features(references, ground)
        self._features = [features, mirrored(*features)]

    def _pixel_energy(self, images: np.ndarray) -> np.ndarray:
        """Return the squared difference of each drawing, RGB in [0, 1], from the background, at the judge's size."""
        energy: np.ndarray = ((resize(images, COMPARE) - self.atlas.colours[self.colour]) ** 2).sum((1, 2, 3))
        return energy

    def _drawing(self, image: np.ndarray) -> np.ndarray:
        """Return an image's drawing as a batch of one, RGB in [0, 1]."""
        return window(self.atlas, image)[None].astype(np.float32) / 255

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """Return the judge's distances of an image, uint8 [256, 256, 3], to every drawing: [styles, subjects]."""
        size = self.atlas.sizes["single"]["medium"]
        squares = self._judge.distances(image, self.colour, *PLACE, size)
        energy = self._pixel_energy(self._drawing(image))[0] + self._energy
        return np.sqrt(squares.clip(0) / np.maximum(energy, 1e-12))

    def look(self, image: np.ndarray) -> np.ndarray:
        """Return the look measure of an image, uint8 [256, 256, 3], to every drawing: [styles, subjects]."""
        colours, edges = look_features(self._drawing(image), self.atlas.colours[self.colour])
        found = [(relative_distances(colours, c)[0] + relative_distances(edges, e)[0]) / 2 for c, e in self._features]
        return np.minimum(*found).reshape(self.atlas.sprites.shape[:2])

    def find(self, image: np.ndarray, style: int, subject: int) -> Finding:
        """Return the nearest drawing of another name by both measures."""
        return Finding(
            subject,
            style,
            nearest_other(self.pixels(image), style, subject),
            nearest_other(self.look(image), style, subject),
        )


def nearest_other(distances: np.ndarray, style: int, subject: int) -> Nearest:
    """Return the nearest drawing of another subject, in either style, of distances [styles, subjects]."""
    others = distances.copy()
    others[:, subject] = np.inf
    at, other = np.unravel_index(int(others.argmin()), others.shape)
    return Nearest(int(other), int(at), float(others[at, other]), float(distances[style, subject]))


def prompt_of(names: list[str], style: str, colour: str) -> str:
    """Return a plain prompt for one subject, or for two side by side."""
    places = ["the {}"] if len(names) == 1 else ["the {} on the left", "the {} on the right"]
    what = " and ".join(place.format(name) for place, name in zip(places, names, strict=True))
    return f"{what}, {STYLE_WORDS[style]} style, {colour} background"


def draw_subjects(
    system: System, atlas: Atlas, names: list[str], chosen: list[tuple[int, int]], colour: str, seed: int
) -> dict[tuple[int, int], np.ndarray]:
    """Draw (style, subject) pairs, two per image; return each drawing centred on a canvas of its own."""
    groups: list[list[tuple[int, int]]] = []
    for style in sorted({style for style, _ in chosen}):
        of_style = [at for at in chosen if at[0] == style]
        half = (len(of_style) + 1) // 2  # neighbours in the list are similar, so they do not share an image
        groups += [[of_style[i], *of_style[half + i : half + i + 1]] for i in range(half)]
    prompts = [prompt_of([names[i] for _, i in group], atlas.styles[group[0][0]], colour) for group in groups]
    found = {}
    for group, image in zip(groups, system.generate(prompts, [seed] * len(prompts)), strict=True):
        layout = "single" if len(group) == 1 else "left_right"
        for at, (x, _) in zip(group, atlas.centres["256x256"][layout], strict=True):
            canvas = np.empty_like(image)
            canvas[:] = np.rint(255 * atlas.colours[colour])
            room = CANVAS // len(group) // 2
            canvas[:, PLACE[0] - room : PLACE[0] + room] = image[:, x - room : x + room]
            found[at] = canvas
    return {at: found[at] for at in chosen}


def markdown(atlas: Atlas, names: list[str], findings: list[Finding], top: int, drawn: bool) -> str:
    """Return the closest findings as a Markdown table, the nearest first."""

    def other(nearest: Nearest) -> str:
        text = f"{names[nearest.subject]} ({STYLE_WORDS[atlas.styles[nearest.style]]}) | {nearest.other:.2f}"
        return f"{text} | {nearest.own:.2f}" if drawn else text

    own = ["its own"] if drawn else []
    head = ["subject", "style", "nearest by pixels", "distance", *own, "nearest by look", "distance", *own]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for finding in sorted(findings, key=lambda f: f.difference)[:top]:
        style = STYLE_WORDS[atlas.styles[finding.style]]
        lines.append(f"| {names[finding.subject]} | {style} | {other(finding.pixels)} | {other(finding.look)} |")
    return "\n".join(lines) + "\n"


def closest_rows(
    atlas: Atlas,
    names: list[str],
    findings: list[Finding],
    images: dict[tuple[int, int], np.ndarray],
    colour: str,
    top: int,
) -> list[tuple[str, list[SheetImage]]]:
    """Return a contact sheet's rows, the nearest first: image, own drawing, nearest by pixels and by look."""
    cells = []
    for finding in sorted(findings, key=lambda f: f.difference)[:top]:
        shown = [images[finding.style, finding.subject], compose(atlas, finding.style, finding.subject, colour)]
        labels = [f"{names[finding.subject]}, {STYLE_WORDS[atlas.styles[finding.style]]}", "its drawing"]
        for kind, nearest in (("pixels", finding.pixels), ("look", finding.look)):
            shown.append(compose(atlas, nearest.style, nearest.subject, colour))
            labels.append(f"{kind}: {names[nearest.subject]}")
        cells.append([SheetImage(window(atlas, image), label) for image, label in zip(shown, labels, strict=True)])
    beside = SHEET_COLUMNS // 4
    return [("", [cell for group in cells[i : i + beside] for cell in group]) for i in range(0, len(cells), beside)]


def write_unlabelled(
    atlas: Atlas, names: list[str], images: dict[tuple[int, int], np.ndarray], folder: Path
) -> list[Path]:
    """Write the images in shuffled order as sheets of numbered cells, and ``key.tsv`` with what each number is."""
    folder.mkdir(parents=True, exist_ok=True)
    order = list(images)
    random.Random(str(order)).shuffle(order)  # each set of drawings has its own order, so that no key reveals another
    key = [
        f"{number}\t{names[subject]}\t{STYLE_WORDS[atlas.styles[style]]}"
        for number, (style, subject) in enumerate(order, 1)
    ]
    (folder / "key.tsv").write_text("\n".join(key) + "\n", "utf-8")
    cells = [SheetImage(window(atlas, images[at]), str(number)) for number, at in enumerate(order, 1)]
    paths = []
    per_sheet = SHEET_COLUMNS * SHEET_ROWS
    for start in range(0, len(cells), per_sheet):
        part = cells[start : start + per_sheet]
        rows = [("", part[i : i + SHEET_COLUMNS]) for i in range(0, len(part), SHEET_COLUMNS)]
        paths.append(folder / f"{start // per_sheet + 1}.png")
        draw_sheet(["What is it?"], [Section("", None, rows, SHEET_CELL)]).save(paths[-1])
    return paths


def choose(
    atlas: Atlas, names: list[str], subjects: list[str], styles: list[str], colour: str
) -> list[tuple[int, int]]:
    """Return the (style, subject) pairs to compare; empty lists choose all.

    Raises:
        typer.BadParameter: the judge's data has no such subject, style or colour.
    """
    for option, given, known in (
        ("--subject", subjects, names),
        ("--style", styles, atlas.styles),
        ("--background", [colour], list(atlas.colours)),
    ):
        if unknown := sorted(set(given) - set(known)):
            listed = "scenes.json has them" if len(known) > 20 else f"there are {', '.join(known)}"
            raise typer.BadParameter(f"{option} {', '.join(unknown)}: the judge's data has no such name; {listed}")
    return [
        (style, subject)
        for style, called in enumerate(atlas.styles)
        for subject, name in enumerate(names)
        if (not subjects or name in subjects) and (not styles or called in styles)
    ]


def main(
    bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle that draws the subjects. By default the reference drawings are compared."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the table, which is also printed.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file with each image, its own drawing and the nearest others.")
    ] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="Folder for numbered sheets and their key.tsv.")] = None,
    top: Annotated[int, typer.Option(help="Number of rows, closest first.")] = 40,
    subjects: Annotated[
        list[str] | None,
        typer.Option("--subject", help="Only this subject, e.g. cat; may be repeated. By default all."),
    ] = None,
    styles: Annotated[
        list[str] | None, typer.Option("--style", help="Only this style, noto (classic) or flat. By default both.")
    ] = None,
    colour: Annotated[str, typer.Option("--background", help="Background, one of the judge's colours.")] = "white",
    seed: Annotated[int, typer.Option(help="Seed of every image.")] = 1,
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "onnxruntime",
    data: Annotated[Path, typer.Option(help="Folder of the judge's data.")] = DATA,
) -> None:
    """Compare every subject's image with the drawings of all others and write the closest."""
    atlas, names = Atlas.load(data), atlas_names(data)
    chosen = choose(atlas, names, subjects or [], styles or [], colour)
    if bundle is None:
        images = {(s, i): compose(atlas, s, i, colour) for s, i in chosen}
    else:
        system = load_system("zimage_rt", bundle=str(bundle), backend=backend)
        images = draw_subjects(system, atlas, names, chosen, colour, seed)
    if unlabelled is not None:
        write_unlabelled(atlas, names, images, unlabelled)
    measures = Measures(atlas, colour)
    findings = [measures.find(image, style, subject) for (style, subject), image in images.items()]
    table = markdown(atlas, names, findings, top, bundle is not None)
    typer.echo(table)
    if bundle is not None:
        for name in ("pixels", "look"):
            wrong_ones = [f for f in findings if (n := getattr(f, name)).other < n.own]
            typer.echo(f"by {name}, {len(wrong_ones)} of {len(findings)} are nearer to a drawing of another name")
    if out is not None:
        out.write_text(table, "utf-8")
    if sheet is not None:
        rows = closest_rows(atlas, names, findings, images, colour, top)
        draw_sheet(["The nearest drawings of another name"], [Section("", None, rows, SHEET_CELL)]).save(
            sheet, optimize=True
        )


def atlas_names(folder: Path = DATA) -> list[str]:
    """Return the subjects' English names, in the atlas's order.

    Raises:
        KeyError: the data has no names.
    """
    return list(json.loads((folder / "scenes.json").read_text("utf-8"))["names"])


if __name__ == "__main__":
    typer.run(main)
