"""Conversion of texts and JSON values to the values of a request's fields, strictly by the field's kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import RequestError

# The kinds, worded as in messages.
TEXT, WHOLE, NUMBER, NUMBERS, FILE = "text", "a whole number", "a number", "numbers", "a path"
FLAG = "true or false"
WEIGHTS = "names with weights, such as style=0.8"
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# Python's int() and float() accept more (1_000, nan, digits of other scripts), which is more likely a mistake.
NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FULL_WIDTH = str.maketrans("０１２３４５６７８９．－＋", "0123456789.-+")
LARGEST_EXACT = 2**53


def read_value(name: str, kind: str, value: Any, folder: Path = Path()) -> Any:
    """Convert a text, or a JSON value, to a kind of value.

    Args:
        name: the field's or column's name, for errors.
        kind: one of the kinds above.
        value: a text, which is parsed, or a JSON value of the kind.
        folder: the folder that relative paths begin at.

    Raises:
        RequestError: the value is not of that kind.
    """
    try:
        return CONVERTERS[kind](value, folder)
    except (ValueError, TypeError, OverflowError, KeyError):
        raise RequestError(f"{name}: expected {kind}, got {shown(value)}", field=name) from None


def _text(value: Any, folder: Path) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _file(value: Any, folder: Path) -> Path:
    name = _text(value, folder).strip()
    if not name or "\0" in name:
        raise ValueError
    name.encode()  # raises ValueError for a lone surrogate
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
        # An empty entry, as in 1,,0.5, is a missing number: _number refuses it.
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


def _weights(value: Any, folder: Path) -> dict[str, float]:
    if isinstance(value, str):
        pairs = [item.rpartition("=") for item in re.split(r"[;,；，]", value) if item.strip()]
        named = {(name or weight).strip(): _number(weight, folder) if name else 1.0 for name, _, weight in pairs}
        if len(named) < len(pairs):
            raise ValueError
        return named
    if not isinstance(value, dict):
        raise TypeError
    return {_text(name, folder): _number(_real(weight), folder) for name, weight in value.items()}


CONVERTERS: Mapping[str, Callable[[Any, Path], Any]] = {
    TEXT: _text,
    FILE: _file,
    FLAG: _flag,
    NUMBER: _number,
    WHOLE: _whole,
    NUMBERS: _numbers,
    WEIGHTS: _weights,
}
