"""Checks of single values. Each returns the value in its plain type, or raises RequestError with the field's name."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RequestError
from .limits import MAX_LORA_WEIGHT

# Characters of a value in a message.
MAX_SHOWN = 80


def shown(value: Any) -> str:
    """A value's repr for a message, cut to `MAX_SHOWN` characters; its type if the repr fails."""
    try:
        text = repr(value)
    except Exception:  # from a caller's __repr__, or an int with more digits than Python converts
        return f"a {type(value).__name__} that cannot be shown"
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def shown_text(text: str, most: int = 400) -> str:
    """Another library's text for a message, cut to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def flag(value: Any, name: str) -> bool:
    """A bool, or numpy's bool; numbers are refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise RequestError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def integer(value: Any, name: str, low: int, high: int) -> int:
    """An int from `low` to `high`, or numpy's integer scalar; bools and floats are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RequestError(f"{name}: expected a whole number, got {shown(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name}: expected {low} to {high}, got {shown(int(value))}")
    return int(value)


def number(value: Any, name: str, high: float = math.inf, low: float = 0.0) -> float:
    """A finite number from `low` to `high`, or numpy's scalar; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise RequestError(f"{name}: expected a number, got {shown(value)}")
    try:
        result = float(value)
    except OverflowError:  # an int beyond the largest float
        result = math.inf
    if not math.isfinite(result) or result < low:
        least = "" if low == -math.inf else f", {low:g} or more"
        raise RequestError(f"{name}: expected a finite number{least}, got {shown(value)}")
    if result > high:
        raise RequestError(f"{name}: expected at most {high:g}, got {shown(value)}")
    return result


def weight(value: Any, name: str) -> float:
    """A LoRA's weight: a finite number of either sign."""
    try:
        return number(value, name, MAX_LORA_WEIGHT, -MAX_LORA_WEIGHT)
    except RequestError:
        raise RequestError(f"{name}: expected a finite weight such as 0.8, got {shown(value)}") from None


def choice(value: Any, name: str, known: Iterable[str]) -> str:
    """A string that is one of the known names."""
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise RequestError(f"{name}: expected one of {', '.join(names)}, got {shown(value)}")
    return value


def items(value: Any, name: str, what: str, most: int) -> tuple[Any, ...]:
    """The entries of a list, a tuple or a 1-D array, at most `most` of them; strings are refused."""
    if isinstance(value, (str, bytes)) or not (
        isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim == 1)
    ):
        raise RequestError(f"{name}: expected {what}, got {type(value).__name__}")
    try:
        count = len(value)
        found = tuple(itertools.islice(value, most + 1))
    except Exception as error:  # from a caller's __len__ or __iter__
        raise RequestError(f"{name}: expected {what}, got a {type(value).__name__} that fails: {error!r}") from error
    if count > most or len(found) > most:
        raise RequestError(f"{name}: expected at most {most} entries, got {max(count, len(found))}")
    return found


def array(value: Any, name: str, what: str) -> np.ndarray:
    """A numpy array, or another library's tensor that numpy can convert; lists, which have no dtype, are refused."""
    if not hasattr(type(value), "__array__"):
        raise RequestError(f"{name}: expected {what}, got {type(value).__name__}")
    try:
        return np.asarray(value)
    except Exception as error:  # tensors on other devices, or a caller's __array__
        raise RequestError(f"{name}: expected {what}, got a {type(value).__name__} that fails: {error}") from error


def named(value: Any, name: str) -> dict[str, Any]:
    """A mapping with string keys, as a dict."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}: expected names and values, got {shown(value)}")
    try:
        found = dict(value)
    except Exception as error:  # from a caller's mapping
        raise RequestError(f"{name}: expected names and values, got one that fails: {error!r}") from error
    for key in found:
        if not isinstance(key, str):
            raise RequestError(f"{name}: expected text as names, got {shown(key)}")
    return found


def path(value: Any, name: str) -> Path:
    """A path that the file system can encode, from a string or a `Path`."""
    try:
        text = os.fspath(value)
    except Exception:
        text = None
    if not isinstance(text, str):
        raise RequestError(f"{name}: expected a path, got {shown(value)}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: {shown(text)} is no path: {error.reason}; rename the file") from error
    if "\0" in text:
        raise RequestError(f"{name}: {shown(text)} is no path: it has a NUL character in it")
    return Path(text)


def function(value: Any, name: str) -> None:
    """Raise RequestError unless the value is callable or None."""
    if value is not None and not callable(value):
        raise RequestError(f"{name}: expected a function, got {shown(value)}")
