"""Contact sheets: labelled images in rows, under headings."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RequestWarning
from .fonts import PACKAGE, Font, find_font

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN = 16
GAP = 6
LABEL_SIZE = 13
HEADING_SIZE = 15
TITLE_SIZE = 18
LINE = 1.35  # line height of text, as a multiple of its size
# Below this size an image shows too little, and its label does not fit.
MIN_CELL = 88
INK, FAINT, PAPER = "#202020", "#606060", "#ffffff"


@dataclasses.dataclass(frozen=True)
class SheetImage:
    """An image, uint8 `[height, width, 3]`, and the label under it."""

    pixels: np.ndarray
    label: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows of images under a title.

    Attributes:
        title: the title above the rows.
        columns: one heading per column, or None.
        rows: per row, the label on the left and the images; all rows have the same number of images.
        cell: the longer side of an image on the sheet, in pixels.
        shrink: whether images may be smaller, so that the section is no wider than those before it.
    """

    title: str
    columns: Sequence[str] | None
    rows: Sequence[tuple[str, Sequence[SheetImage]]]
    cell: int
    shrink: bool = False


def draw_sheet(titles: Sequence[str], sections: Sequence[Section], font: str | Path | None = None) -> Image:
    """Draw a sheet.

    Args:
        titles: the lines at the top; the first is larger.
        sections: the sections from top to bottom.
        font: a TrueType file; if None, Pillow's own font, or a system font if that has more of the characters.

    Raises:
        RequestError: the font cannot be read.

    Warns:
        RequestWarning: the font lacks characters of the titles, which are drawn as `_`.
    """
    from PIL import Image, ImageDraw

    texts = "".join("".join(title.split()) for title in titles)
    chosen = find_font(texts) if font is None else Font(font)
    missing = chosen.missing(texts)
    if missing:
        instead = f"install one, e.g. Debian's package {PACKAGE}, or name one" if font is None else "name another"
        warnings.warn(
            f"font: {'no font found here' if font is None else font} has {''.join(missing[:10])}, drawn as _ on the "
            f"sheet; {instead} with --font",
            RequestWarning,
            stacklevel=2,
        )
    pen = _Pen(chosen)
    left = max(pen.width(label) for section in sections for label, _ in section.rows) + 2 * GAP
    room = max(
        (len(section.rows[0][1]) * (section.cell + GAP) for section in sections if not section.shrink), default=0
    )
    cells = [_cell_size(section, room) for section in sections]
    widest = max(len(section.rows[0][1]) * (cell + GAP) for section, cell in zip(sections, cells, strict=True))
    headings = max(pen.width(section.title, HEADING_SIZE) for section in sections)
    width = 2 * MARGIN + max(left + widest, headings)
    header = [
        (line, TITLE_SIZE if number == 0 else LABEL_SIZE, FAINT if number else INK)
        for number, title in enumerate(titles)
        for line in pen.wrapped(title, width - 2 * MARGIN, TITLE_SIZE if number == 0 else LABEL_SIZE)
    ]
    label_height = round(LABEL_SIZE * LINE)
    title_height = round(TITLE_SIZE * LINE)
    height = 2 * MARGIN + sum(round(size * LINE) for _, size, _ in header)
    for section, cell in zip(sections, cells, strict=True):
        height += 2 * GAP + title_height + (label_height if section.columns else 0)
        height += sum(_row_height(row, cell) + label_height + GAP for _, row in section.rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen.draw = ImageDraw.Draw(sheet)

    y = MARGIN
    for line, size, colour in header:
        pen.text(MARGIN, y, line, size, colour)
        y += round(size * LINE)
    for section, cell in zip(sections, cells, strict=True):
        y += 2 * GAP
        pen.text(MARGIN, y, section.title, HEADING_SIZE, INK)
        y += title_height
        for column, heading in enumerate(section.columns or ()):
            pen.label(MARGIN + left + column * (cell + GAP), y, heading, cell, INK)
        y += label_height if section.columns else 0
        for label, row in section.rows:
            tall = _row_height(row, cell)
            pen.text(MARGIN, y + (tall - label_height) // 2, label, LABEL_SIZE, INK)
            for column, image in enumerate(row):
                x = MARGIN + left + column * (cell + GAP)
                sheet.paste(_scaled(image, cell), (x, y))
                pen.label(x, y + tall, image.label, cell, FAINT)
            y += tall + label_height + GAP
    return sheet


def _cell_size(section: Section, room: int) -> int:
    if not section.shrink or room == 0:
        return section.cell
    return max(min(section.cell, room // len(section.rows[0][1]) - GAP), min(section.cell, MIN_CELL))


def _size(image: SheetImage, cell: int) -> tuple[int, int]:
    """Width and height of an image on the sheet."""
    height, width = image.pixels.shape[:2]
    longer = max(height, width)
    return max(1, round(width * cell / longer)), max(1, round(height * cell / longer))


def _scaled(image: SheetImage, cell: int) -> Image:
    from PIL import Image

    return Image.fromarray(image.pixels).resize(_size(image, cell), Image.Resampling.LANCZOS)


def _row_height(row: Sequence[SheetImage], cell: int) -> int:
    return max(_size(image, cell)[1] for image in row)


class _Pen:
    """Draws text in one font, with `_` in place of characters that the font lacks."""

    draw: Any

    def __init__(self, font: Font) -> None:
        self._font = font

    def _at(self, size: int) -> Any:
        return self._font.at(size)

    def width(self, text: str, size: int = LABEL_SIZE) -> int:
        """The width of a text in pixels, rounded up."""
        return -int(-self._at(size).getlength(text) // 1)

    def label(self, x: int, y: int, text: str, width: int, colour: str) -> None:
        """Draw one line no wider than `width`: in a smaller size if needed, then cut."""
        size = next((size for size in range(LABEL_SIZE, 8, -1) if self.width(text, size) <= width), 8)
        while text and self.width(text, size) > width:
            text = text[:-1]
        self.text(x, y, text, size, colour)

    def text(self, x: int, y: int, text: str, size: int, colour: str) -> None:
        """Draw one line with its top left corner at x, y."""
        self.draw.text((x, y), text, fill=colour, font=self._at(size))

    def wrapped(self, text: str, width: int, size: int) -> list[str]:
        """Wrap a text to lines no wider than `width`, at spaces if possible."""
        lines: list[str] = []
        rest = self._drawable(" ".join(text.split()))
        while rest:
            end = len(rest)
            while end > 1 and self.width(rest[:end], size) > width:
                space = rest.rfind(" ", 0, end)
                end = space if space > 0 else end - 1
            lines.append(rest[:end])
            rest = rest[end:].lstrip()
        return lines

    def _drawable(self, text: str) -> str:
        missing = self._font.missing(text)
        if not missing:
            return text
        kept = "".join("_" if character in missing else character for character in text)
        # The sheet's file holds the complete text.
        return f"{kept}   (_: not in this font; give --font, or read the file's own text)"
