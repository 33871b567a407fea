"""Tables of requests: CSV as Excel and scripts write it, in English and in Chinese, and JSON lines."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RequestError

DELIMITERS = (",", ";", "\t")
# For a table of one column: a character that no text has, so that a comma in a prompt is a comma.
NO_DELIMITER = "\x1f"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row that is not empty.

    Attributes:
        number: from 1; the header does not count.
        line: where it begins in the file, from 1.
        values: by column; text from a CSV file, where an empty cell is left out, JSON values from JSON lines.
        problem: why it cannot be read, or None.
    """

    number: int
    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        path: its file; relative paths in it begin at its folder.
        sha256: of the file.
        columns: of a CSV file's header; None for JSON lines, where every row has its own.
    """

    path: Path
    sha256: str
    columns: tuple[str, ...] | None
    rows: tuple[Row, ...]


def read_table(path: Path, encoding: str | None = None) -> Table:
    """Read a CSV file (`,`, `;` or tab between cells, as its header shows) or JSON lines (.jsonl, .ndjson).

    Args:
        path: the file.
        encoding: how its text is written; found out if None: UTF-8, UTF-16 with its mark, else GB18030 (and so GBK).

    Raises:
        RequestError: it cannot be read, is not a table, or has no rows. A row that is not well formed is not an error
            here: its `problem` says what is wrong with it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; name a CSV file or JSON lines") from error
    text = _decode(content, path, encoding)
    sha256 = hashlib.sha256(content).hexdigest()
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        columns, rows = None, tuple(_json_rows(text))
    else:
        columns, rows = _csv_rows(text, path)
    if not rows:
        raise RequestError(f"{path}: expected a header and rows below it, or JSON lines; got no rows")
    return Table(path, sha256, columns, rows)


def _decode(content: bytes, path: Path, encoding: str | None) -> str:
    if encoding is None and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    for name in ("utf-8-sig", "gb18030") if encoding is None else (encoding,):
        try:
            text = content.decode(name)
            if encoding is None and name == "utf-8-sig" and not content.startswith(codecs.BOM_UTF8):
                _refuse_ambiguous(text, content, path)
            return text.removeprefix("\ufeff")
        except LookupError:
            raise RequestError(f"encoding: expected a name as Python has it, e.g. gb18030, got {name!r}") from None
        except UnicodeDecodeError:
            continue
    expected = "UTF-8, UTF-16 or GB18030" if encoding is None else encoding
    raise RequestError(f"{path}: its text is not {expected}; save it as UTF-8, or give --encoding")


def _refuse_ambiguous(text: str, content: bytes, path: Path) -> None:
    """Raise RequestError where text is UTF-8 by chance: 猫 in GBK is è in UTF-8.

    It takes a table with next to no Chinese in it, all of it of certain bytes. Latin letters beyond ASCII are rarely
    without ASCII ones beside them, which tells the two apart in nearly all texts.
    """
    runs = re.findall(r"[^\x00-\x7f]+", text)
    if not runs or re.search(r"[A-Za-z][^\x00-\x7f]|[^\x00-\x7f][A-Za-z]", text):
        return
    try:
        other = re.findall(r"[^\x00-\x7f]+", content.decode("gb2312"))
    except UnicodeDecodeError:
        return
    raise RequestError(
        f"{path}: its text may be UTF-8, with {runs[0]!r} in it, or GB18030, with {other[0]!r}; "
        "say which with --encoding, or save it as UTF-8 with a mark"
    )


def _sniff_delimiter(text: str) -> str:
    """What stands between the cells of the first line that is not empty: what gives the most of them."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    counts: dict[str, int] = {}
    for delimiter in DELIMITERS:
        try:
            counts[delimiter] = len(next(csv.reader([header], delimiter=delimiter, strict=True)))
        except csv.Error:
            counts[delimiter] = 0
    best = max(DELIMITERS, key=lambda delimiter: counts[delimiter])
    return best if counts[best] > 1 else NO_DELIMITER


def _csv_rows(text: str, path: Path) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    delimiter = _sniff_delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return columns, tuple(rows)
        except csv.Error as error:
            # From here on it is not known where rows begin.
            raise RequestError(
                f"{path}, line {line}: {error}; put text that holds quotes in quotes and double them inside"
            ) from error
        if any(cell.strip() for cell in cells):
            if not columns:
                columns = _header(cells, path)
            else:
                rows.append(_csv_row(len(rows) + 1, line, columns, cells, delimiter))
        line = reader.line_num + 1


def _header(cells: list[str], path: Path) -> tuple[str, ...]:
    columns = tuple(cell.strip() for cell in cells)
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise RequestError(f"{path}: column {twice[0]!r} is there twice; rename one")
    return columns


def _csv_row(number: int, line: int, columns: tuple[str, ...], cells: list[str], delimiter: str) -> Row:
    values: dict[str, Any] = {}
    for name, cell in itertools.zip_longest(columns, cells, fillvalue=""):
        if name and cell.strip():
            values[name] = cell
        elif cell.strip():
            problem = (
                f"expected {len(columns)} cells, got {len(cells)}, or one under an empty header; "
                f"put text that holds {delimiter!r} in quotes"
            )
            return Row(number, line, values, problem)
    return Row(number, line, values)


def _json_rows(text: str) -> Iterator[Row]:
    number = 0
    # Not splitlines: JSON text may hold line separators of Unicode as they are.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        number += 1
        try:
            values = json.loads(content)
        except ValueError as error:
            yield Row(number, line, {}, f"is not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(number, line, values)
        else:
            yield Row(number, line, {}, f"expected an object, got {type(values).__name__}")
