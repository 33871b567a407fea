"""Render the drawings and the glyphs into one atlas file.

Sources: ``@iconify-json/noto`` (Apache-2.0) and ``@iconify-json/fluent-emoji-flat`` (MIT), fetched
with npm; the glyphs are set in Noto Sans CJK (OFL-1.1). ``rsvg-convert`` draws: resvg crashes on
one of the icons.

    npm install @iconify-json/noto @iconify-json/fluent-emoji-flat
    python drawings.py --npm node_modules --out atlas.npz
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scenes import subjects
from spelling import CELL_HEIGHT, GLYPHS, HAN_WIDTH, LATIN, LATIN_WIDTH

SIDE = 128
PACKAGES = {"noto": "noto", "flat": "fluent-emoji-flat"}  # style → npm package
HAN_SIZE, LATIN_SIZE, LATIN_INK = 41, 48, 28  # points, points, and the widest that a capital may be
FONT = "/usr/share/fonts/opentype/noto/NotoSansCJK-Bold.ttc"


def _plain(code: str) -> str:
    """Normalise a hexcode: lower case, without the emoji variation selector."""
    return code.lower().replace("-fe0f", "")


class IconSet:
    """An iconify package, indexed by code point."""

    def __init__(self, folder: Path) -> None:
        self._icons = json.loads((folder / "icons.json").read_text("utf-8"))
        characters = json.loads((folder / "chars.json").read_text("utf-8"))
        self._names = {_plain(code): name for code, name in characters.items()}

    def svg(self, code: str) -> str:
        """Return the icon of a code point as a standalone SVG."""
        name = self._names[code]
        while name not in self._icons["icons"]:
            name = self._icons["aliases"][name]["parent"]
        icon = self._icons["icons"][name]
        width = icon.get("width", self._icons.get("width", 16))
        height = icon.get("height", self._icons.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
        )


def rasterise(svg: str) -> np.ndarray:
    """Return the drawing as uint8 [SIDE, SIDE, 4], straight alpha."""
    command = ["rsvg-convert", "--width", str(SIDE), "--height", str(SIDE), "--format", "png"]
    png = subprocess.run(command, input=svg.encode(), capture_output=True, check=True).stdout
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def fill_frame(drawing: np.ndarray) -> np.ndarray:
    """Crop the transparent margin and centre the rest, so that both styles have the same size."""
    alpha = drawing[..., 3] > 8
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    side = max(box[2] - box[0], box[3] - box[1])
    square = Image.new("RGBA", (side, side))
    image = Image.fromarray(drawing).crop(box)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Resize premultiplied, or transparent pixels bleed their colour into the edge.
    premultiplied = square.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(premultiplied.convert("RGBA"))


def draw_glyph(glyph: str) -> np.ndarray:
    """Return a glyph's coverage as uint8 [CELL_HEIGHT, HAN_WIDTH], at the left if its cell is narrower."""
    latin = glyph in LATIN
    cell = LATIN_WIDTH if latin else HAN_WIDTH
    font = ImageFont.truetype(FONT, LATIN_SIZE if latin else HAN_SIZE, index=2)  # 2: Simplified Chinese
    big = Image.new("L", (128, 128))
    # A capital's middle is above the line's middle; the ink is centred below.
    ImageDraw.Draw(big).text((64, 64), glyph, fill=255, font=font, anchor="mm")
    left, top, right, bottom = big.getbbox() or (0, 0, 1, 1)
    ink = big.crop((left, top, right, bottom))
    if latin and ink.width > LATIN_INK:
        ink = ink.resize((LATIN_INK, ink.height), Image.Resampling.LANCZOS)
    image = Image.new("L", (HAN_WIDTH, CELL_HEIGHT))
    # Capitals share a baseline; a Chinese glyph keeps its place in its square.
    x, y = ((cell - ink.width) // 2, (CELL_HEIGHT - ink.height) // 2) if latin else (left - 40, top - 40)
    image.paste(ink, (x, y))
    return np.asarray(image)


def build(npm: Path) -> dict[str, np.ndarray]:
    """Return ``sprites`` uint8 [styles, subjects, SIDE, SIDE, 4] and ``glyphs`` uint8."""
    sprites = []
    with ThreadPoolExecutor() as pool:
        for package in PACKAGES.values():
            icons = IconSet(npm / "@iconify-json" / package)
            svgs = [icons.svg(subject.hexcode) for subject in subjects()]
            sprites.append(np.stack(list(pool.map(lambda s: fill_frame(rasterise(s)), svgs))))
    return {"sprites": np.stack(sprites), "glyphs": np.stack([draw_glyph(g) for g in GLYPHS])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npm", type=Path, required=True, help="a node_modules folder")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    arguments = parser.parse_args()
    atlas = build(arguments.npm)
    np.savez_compressed(arguments.out, **atlas)
    shape = atlas["sprites"].shape
    print(f"{shape[0]} x {shape[1]} drawings, {len(atlas['glyphs'])} glyphs in {arguments.out}")


if __name__ == "__main__":
    main()
