"""Cells of a table and JSON values to what a request field wants, strictly by the field's kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import RequestError

TEXT, WHOLE, NUMBER, NUMBERS, FILE = "text", "a whole number", "a number", "numbers", "a path"
FLAG = "true or false"
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# What Python's int() and float() take beyond this (1_000, nan, other scripts' digits) is rather a slip than a number.
NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FULL_WIDTH = str.maketrans("０１２３４５６７８９．－＋", "0123456789.-+")
LARGEST_EXACT = 2**53


def convert_cell(column: str, kind: str, value: Any, folder: Path = Path()) -> Any:
    """A cell's text, or a JSON value, as a field of that kind wants it.

    Args:
        column: its name in errors.
        kind: one of TEXT, WHOLE, NUMBER, NUMBERS, FILE and FLAG.
        value: text is read for every kind; other JSON values must be of the kind.
        folder: where relative paths begin.

    Raises:
        RequestError: the value is not of that kind.
    """
    try:
        return CONVERTERS[kind](value, folder)
    except (ValueError, TypeError, OverflowError, KeyError):
        raise RequestError(f"{column}: expected {kind}, got {shown(value)}") from None


def _text(value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _file(value: Any, folder: Path) -> Path:
    name = _text(value, folder).strip()
    if not name or "\0" in name:
        raise ValueError
    name.encode()  # half a surrogate pair is a ValueError
    return folder / name


def _flag(value: Any, folder: Path) -> bool:
    return value if isinstance(value, bool) else FLAGS[_text(value, folder).strip().lower()]


def _number(value: Any, folder: Path) -> float:
    number = float(_numeral(value) if isinstance(value, str) else _real(value))
    if not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: Any, folder: Path) -> int:
    value = _numeral(value) if isinstance(value, str) else _real(value)
    if isinstance(value, str):
        if value.lstrip("+-").isdecimal():
            return int(value)
        value = float(value)  # pandas writes 8.0 in a column that has gaps
    if isinstance(value, float) and (not value.is_integer() or abs(value) > LARGEST_EXACT):
        raise ValueError
    return int(value)


def _numbers(value: Any, folder: Path) -> tuple[float, ...]:
    if isinstance(value, str):
        # A place with nothing in it, as in 1,,0.5, is a forgotten number: _number refuses it.
        return tuple(_number(item, folder) for item in re.split(r"\s*[,;，；]\s*|\s+", value.strip()))
    if not isinstance(value, list):
        raise TypeError
    return tuple(_number(_real(item), folder) for item in value)


def _numeral(text: str) -> str:
    text = text.strip().translate(FULL_WIDTH)
    if not NUMERAL.fullmatch(text):
        raise ValueError
    return text


def _real(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return value


CONVERTERS: Mapping[str, Callable[[Any, Path], Any]] = {
    TEXT: _text,
    FILE: _file,
    FLAG: _flag,
    NUMBER: _number,
    WHOLE: _whole,
    NUMBERS: _numbers,
}
