"""File names of a batch from its table: safe on every system and unique per row."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..checks import shown
from ..errors import RequestError
from ..image.formats import FORMATS
from .rows import RowReader, Template
from .table import Row

# Characters that some file system refuses, or reads as a path separator.
UNSAFE = frozenset('/\\:*?"<>|')
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}
# Bytes: file systems allow 255, and a temporary suffix, a number and an ending are added.
MAX_STEM = 180
# Images per row whose names are checked; rows with more are refused when they are drawn.
MAX_IMAGES = 1000


def check_stem(stem: str) -> None:
    """Raise RequestError unless a text is a valid file name, without its ending, on every system."""
    problem = None
    if any(character in UNSAFE or ord(character) < 32 or ord(character) == 127 for character in stem):
        problem = 'without path parts, control characters and any of / \\ : * ? " < > |'
    elif not stem or stem != stem.strip() or stem.startswith(".") or stem.endswith("."):
        problem = "that neither begins nor ends with a dot or a space"
    elif stem.casefold().partition(".")[0] in RESERVED:
        problem = "that Windows does not keep for a device"
    else:
        try:
            if len(stem.encode()) > MAX_STEM:
                problem = f"of at most {MAX_STEM} bytes"
        except UnicodeEncodeError:
            problem = "without half a character (a lone surrogate)"
    if problem is not None:
        raise RequestError(f"name: expected a file's name {problem}, got {shown(stem)}")


def row_stems(rows: Sequence[Row], reader: RowReader, name: Template) -> dict[int, str]:
    """The stem of each row's files, by the row's number; rows with a problem have none.

    Raises:
        RequestError: a name is empty or unsafe, or two rows would write one file; the message names the rows.
    """
    stems: dict[int, str] = {}
    owners: dict[str, Row] = {}
    for row in rows:
        if row.problem is not None:
            continue
        try:
            stem = _without_ending(name.fill(row.values))
            check_stem(stem)
        except RequestError as error:
            raise RequestError(f"row {row.number} (line {row.line}): {error}") from error
        stems[row.number] = stem
        count = reader.count(row)
        for file in [stem, *(f"{stem}-{i:03d}" for i in range(min(count, MAX_IMAGES) if count > 1 else 0))]:
            # Some file systems identify names that differ in case or in the Unicode form of accents.
            key = unicodedata.normalize("NFC", file).casefold()
            other = owners.setdefault(key, row)
            if other is not row:
                raise RequestError(
                    f"name: rows {other.number} (line {other.line}) and {row.number} (line {row.line}) would both be "
                    f"{file!r}; put a column into the name that tells them apart"
                )
    return stems


def _without_ending(name: str) -> str:
    ending = next((ending for ending in FORMATS if name.casefold().endswith(ending)), "")
    return name[: len(name) - len(ending)]
