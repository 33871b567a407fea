"""Finds a system font that has the characters of a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError

# Font files of several systems, with the index of the face for simplified Chinese.
PLACES: Sequence[tuple[str, int]] = (
    ("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc", 2),  # Debian's fonts-noto-cjk
    ("/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc", 0),
    ("/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc", 0),
    ("/usr/share/fonts/wqy-microhei/wqy-microhei.ttc", 0),
    ("/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf", 0),
    ("/usr/share/fonts/truetype/droid/DroidSansFallback.ttf", 0),
    ("/usr/share/fonts/truetype/arphic/uming.ttc", 0),
    ("/System/Library/Fonts/PingFang.ttc", 0),
    ("/System/Library/Fonts/Hiragino Sans GB.ttc", 0),
    ("/System/Library/Fonts/STHeiti Light.ttc", 0),
    ("/Library/Fonts/Arial Unicode.ttf", 0),
    ("C:/Windows/Fonts/msyh.ttc", 0),
    ("C:/Windows/Fonts/simhei.ttf", 0),
    ("C:/Windows/Fonts/simsun.ttc", 0),
    ("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", 0),  # no Chinese, but Greek, Cyrillic and more
)
# The package to install if there is no font, by its name in Debian and Ubuntu.
PACKAGE = "fonts-noto-cjk"


class Font:
    """A font at any size.

    Args:
        path: a TrueType or OpenType file; Pillow's own font of Latin letters if None.
        index: of the face in a collection.

    Raises:
        RequestError: the file cannot be read as a font.
    """

    def __init__(self, path: str | Path | None = None, index: int = 0) -> None:
        self._path, self._index = path, index
        self._sizes: dict[int, Any] = {}
        self._known: dict[str, bool] = {}
        self.at(12)

    def at(self, size: int) -> Any:
        """Pillow's font object of a size, in pixels."""
        from PIL import ImageFont

        if size not in self._sizes:
            try:
                self._sizes[size] = (
                    ImageFont.load_default(size)
                    if self._path is None
                    else ImageFont.truetype(self._path, size, index=self._index)
                )
            except (OSError, ValueError) as error:
                raise RequestError(f"font: {self._path} cannot be read as a TrueType font: {error}") from error
        return self._sizes[size]

    def has(self, character: str) -> bool:
        """Whether the font has a glyph for a character."""
        if character not in self._known:
            self._known[character] = self._has(character)
        return self._known[character]

    def _has(self, character: str) -> bool:
        font = self.at(12)
        try:
            drawn, box = font.getmask(character), font.getmask("\U0010fffd")  # a private character: no font has it
        except (UnicodeEncodeError, OSError):
            return False  # without FreeType, Pillow has only a font of Latin letters
        return character.isspace() or (drawn.size, bytes(drawn)) != (box.size, bytes(box))

    def missing(self, text: Iterable[str]) -> list[str]:
        """The characters without a glyph, sorted, without duplicates."""
        return [character for character in sorted(set(text)) if not self.has(character)]


def find_font(text: str, places: Sequence[tuple[str, int]] | None = None) -> Font:
    """The first font with all characters of a text, Pillow's own or a system font; else the font with the most.

    Args:
        text: the text to draw.
        places: font files and indices of faces to try; PLACES if None.
    """
    best = Font()
    missing = best.missing(text)
    for path, index in PLACES if places is None else places:
        if not missing:
            break
        if not Path(path).is_file():
            continue
        try:
            font = Font(path, index)
        except RequestError:
            continue  # damaged, or in a format that this Pillow does not support
        left = font.missing(text)
        if len(left) < len(missing):
            best, missing = font, left
    return best
