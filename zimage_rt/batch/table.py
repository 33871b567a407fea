"""Readers of tables: CSV as Excel and scripts write it, in English and in Chinese encodings, .xlsx and JSON lines."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..bundle.json_codec import parse_json
from ..checks import shown
from ..errors import RequestError
from .excel import CellProblem, read_sheet

DELIMITERS = (",", ";", "\t")
# The delimiter of a table of one column: a character that no text has, so that commas in prompts are text.
NO_DELIMITER = "\x1f"
# Excel's declaration of the delimiter, in a line before the header.
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[ \t]*(?:\r\n|\r|\n|$)', re.IGNORECASE)
EXCEL = (".xlsx", ".xlsm")
JSON_LINES = (".jsonl", ".ndjson")
# Unsupported tables of other programs, which would otherwise be decoded as text.
OTHER_TABLES = (".xls", ".xlsb", ".ods", ".numbers", ".et", ".parquet")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row that is not empty.

    Attributes:
        number: its number from 1, without the header.
        line: the line of the file that it begins in, from 1.
        values: by column: texts from CSV and Excel, without empty cells, or JSON values from JSON lines.
        problem: why it cannot be read, or None.
    """

    number: int
    line: int
    values: dict[str, Any]
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        path: its file; relative paths in it begin at its folder.
        sha256: hex, of the file.
        columns: the header's columns; None for JSON lines, whose rows have keys of their own.
        rows: the rows that are not empty.
    """

    path: Path
    sha256: str
    columns: tuple[str, ...] | None
    rows: tuple[Row, ...]


def read_table(path: Path, encoding: str | None = None, sheet: str | None = None) -> Table:
    """Read CSV (delimited by `,`, `;` or tab, by its header), Excel's .xlsx, or JSON lines (.jsonl, .ndjson).

    Args:
        path: the file.
        encoding: the text's encoding; detected if None: UTF-8, UTF-16 with a BOM, else GB18030 (which includes GBK).
        sheet: the name of a sheet of an Excel file; the first if None.

    Raises:
        RequestError: it cannot be read, is not a table, has no rows, or needs openpyxl, which is not installed. A
            malformed row is no error here: it has a `problem`.
    """
    suffix = path.suffix.lower()
    if suffix in OTHER_TABLES:
        raise RequestError(f"{path}: expected CSV, .xlsx or JSON lines; save it as .xlsx, or as CSV in UTF-8")
    if sheet is not None and suffix not in EXCEL:
        raise RequestError(f"sheet: expected a table in .xlsx, got {path.name}, which has no sheets; leave it out")
    if encoding is not None and suffix in EXCEL:
        raise RequestError(f"encoding: expected CSV or JSON lines, got {path.name}, which says so itself; leave it out")
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{shown(str(path))} cannot be read: {reason}; name a table") from error
    columns: tuple[str, ...] | None
    if suffix in EXCEL:
        columns, rows = _rows_of_cells(read_sheet(content, path, sheet), path)
    else:
        text = _decode(content, path, encoding)
        columns, rows = (None, tuple(_json_rows(text))) if suffix in JSON_LINES else _csv_rows(text, path)
    if not rows:
        raise RequestError(f"{path}: expected a header and rows below it, or JSON lines; got no rows")
    return Table(path, hashlib.sha256(content).hexdigest(), columns, rows)


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
    """Raise RequestError for GBK text that is valid UTF-8 by chance: 猫 in GBK is è in UTF-8.

    This needs a table with very little Chinese, all of certain bytes. Accented Latin letters nearly always have ASCII
    letters beside them, which distinguishes the two.
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
    """The delimiter that splits the first line that is not empty into the most cells."""
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
    said = SEPARATOR_LINE.match(text)
    text = text[said.end() :] if said else text
    delimiter = said[1] if said else _sniff_delimiter(text)
    if (not delimiter.isprintable() and delimiter not in (*DELIMITERS, NO_DELIMITER)) or delimiter == '"':
        raise RequestError(f"{path}: expected sep= with what stands between cells, got sep={delimiter!r}")
    first = 2 if said else 1
    return _rows_of_cells(
        _csv_cells(text, path, delimiter, first), path, f"; put text that holds {delimiter!r} in quotes"
    )


def _csv_cells(text: str, path: Path, delimiter: str, line: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the numbers of lines, from `line`, and their cells. Raises RequestError for unbalanced quotes."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = line - 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The beginnings of later rows are unknown.
            raise RequestError(
                f"{path}, line {line}: {error}; put text that holds quotes in quotes and double them inside"
            ) from error
        yield line, cells
        line = before + reader.line_num + 1


def _rows_of_cells(
    lines: Iterator[tuple[int, list[str]]] | Iterator[tuple[int, list[str | CellProblem]]], path: Path, hint: str = ""
) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """The header, which is the first line that is not empty, and the rows below it."""
    columns: tuple[str, ...] = ()
    rows: list[Row] = []
    for line, cells in lines:
        if not any(isinstance(cell, CellProblem) or cell.strip() for cell in cells):
            continue
        if columns:
            rows.append(_row(len(rows) + 1, line, columns, cells, hint))
        else:
            columns = _header(cells, path)
    return columns, tuple(rows)


def _header(cells: Sequence[str | CellProblem], path: Path) -> tuple[str, ...]:
    problem = next((cell for cell in cells if isinstance(cell, CellProblem)), None)
    if problem is not None:
        raise RequestError(f"{path}: {problem.text}")
    columns = tuple(str(cell).strip() for cell in cells)
    seen: set[str] = set()
    for name in filter(None, columns):
        if name in seen:
            raise RequestError(f"{path}: column {name!r} is there twice; rename one")
        seen.add(name)
    return columns


def _row(number: int, line: int, columns: tuple[str, ...], cells: Sequence[str | CellProblem], hint: str) -> Row:
    values: dict[str, Any] = {}
    for name, cell in itertools.zip_longest(columns, cells, fillvalue=""):
        if isinstance(cell, CellProblem):
            return Row(number, line, values, cell.text)
        if name and cell.strip():
            values[name] = cell
        elif cell.strip():
            problem = f"expected {len(columns)} cells, got {len(cells)}, or one under an empty header{hint}"
            return Row(number, line, values, problem)
    return Row(number, line, values)


def _json_rows(text: str) -> Iterator[Row]:
    number = 0
    # Not splitlines: JSON strings may have Unicode's line separators in them.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        number += 1
        try:
            values = parse_json(content.strip(), half_pairs=True)  # the request's check names the field with one
        except ValueError as error:
            yield Row(number, line, {}, f"is not JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(number, line, values)
        else:
            yield Row(number, line, {}, f"expected an object, got {type(values).__name__}")
