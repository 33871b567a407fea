"""Reader of Excel sheets: the cells as text, formatted as Excel formats plain values."""

from __future__ import annotations

import dataclasses
import datetime
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import RequestError

# Bytes of the unpacked file; a table of a million cells has about a tenth of it.
MAX_BYTES = 1 << 30
# Excel stores 15 digits of a number and replaces the others by zeros.
MAX_WHOLE = 10**15
ERRORS = ("#N/A", "#REF!", "#NAME?", "#VALUE!", "#DIV/0!", "#NULL!", "#NUM!")


@dataclasses.dataclass(frozen=True)
class CellProblem:
    """The error of a cell that cannot be read: why, and what to do."""

    text: str


def read_sheet(content: bytes, path: Path, sheet: str | None) -> Iterator[tuple[int, list[str | CellProblem]]]:
    """Yield the numbers of a sheet's rows, from 1, with their cells as text; an empty cell is an empty text.

    Formulas have the values that Excel computed last. A cell that cannot be read is a CellProblem.

    Args:
        content: the bytes of the .xlsx file.
        path: its path, for errors.
        sheet: the sheet's name; the first sheet if None.

    Raises:
        RequestError: openpyxl is not installed, the file is damaged or too large, or there is no such sheet.
    """
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{path}: reading .xlsx needs openpyxl; install it with: pip install 'zimage-rt[xlsx]', or save the table "
            "as CSV in UTF-8"
        ) from error
    damaged = f"{path}: cannot be read as an Excel file"
    try:
        unpacked = sum(info.file_size for info in zipfile.ZipFile(io.BytesIO(content)).infolist())
        if unpacked > MAX_BYTES:
            raise RequestError(f"{path}: expected at most {MAX_BYTES >> 20} MiB unpacked, got {unpacked >> 20} MiB")
        # Values and formulas need two readings of the file: a formula that was never computed has no value.
        values, formulas = (
            openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=only) for only in (True, False)
        )
        names = [worksheet.title for worksheet in values.worksheets]
        if not names or (sheet is not None and sheet not in names):
            raise RequestError(f"sheet: expected one of {', '.join(map(repr, names))} of {path.name}, got {sheet!r}")
        chosen = names.index(sheet) if sheet is not None else 0
        found = [book.worksheets[chosen] for book in (values, formulas)]
        for worksheet in found:
            worksheet.reset_dimensions()  # the size in the file may be wrong
        yield from _rows(*(worksheet.iter_rows() for worksheet in found))
    except RequestError:
        raise
    except Exception as error:  # openpyxl raises various errors for damaged files: KeyError, ValueError, ParseError, …
        reason = shown(str(error)) if str(error) else type(error).__name__
        raise RequestError(f"{damaged}: {reason}; open it in Excel and save it again as .xlsx") from error


def _rows(values: Iterator[Any], formulas: Iterator[Any]) -> Iterator[tuple[int, list[str | CellProblem]]]:
    for number, (row, asked) in enumerate(zip(values, formulas, strict=True), 1):
        yield number, [_cell(cell, formula) for cell, formula in zip(row, asked, strict=True)]


def _cell(cell: Any, formula: Any) -> str | CellProblem:
    value = cell.value
    if value is None:
        if formula.value is None:
            return ""
        return CellProblem(
            f"cell {_place(cell, formula)}: its formula has no value yet; open the file in Excel and save"
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        if abs(value) >= MAX_WHOLE:
            return CellProblem(
                f"cell {_place(cell, formula)}: Excel keeps 15 digits of a number, and this one has more; make the "
                "cell text"
            )
        text = f"{value:.15g}" if isinstance(value, float) else str(value)
        # The number format 00000, common for article numbers, shows 42 as 00042.
        zeros = re.fullmatch(r"0+", str(cell.number_format))
        return text.zfill(len(zeros[0])) if zeros and text.isdecimal() else text
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ", "seconds")
    if isinstance(value, str) and cell.data_type == "e" and value in ERRORS:
        return CellProblem(f"cell {_place(cell, formula)}: holds Excel's error {value}; mend it there")
    return str(value)


def _place(cell: Any, formula: Any) -> str:
    return str(getattr(cell, "coordinate", None) or getattr(formula, "coordinate", "?"))
