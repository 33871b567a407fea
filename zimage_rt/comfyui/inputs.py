"""The inputs of nodes: sockets for links, and widgets with their ranges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..checks import shown


class InputError(Exception):
    """A value that an input does not take; `kind` is ComfyUI's type of the error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Spec(Protocol):
    """The kind of an input. `type` is ComfyUI's name of it, of outputs too; `default` is a new node's value."""

    @property
    def default(self) -> Any:
        """The value of a new node; None if it has none."""

    @property
    def type(self) -> str:
        """ComfyUI's name."""

    def check(self, value: Any) -> Any:
        """The value as the node's function takes it. Raises InputError."""


@dataclasses.dataclass(frozen=True)
class Socket:
    """An input that another node's output fills."""

    type: str
    default: None = None

    def check(self, value: Any) -> Any:
        """Raise InputError: a value is no link."""
        raise InputError("invalid_input_type", f"expected a link to a node's {self.type}, got {shown(value)}")


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number."""

    low: int
    high: int
    type: str = "INT"
    default: int | None = None
    step: int = 1

    def check(self, value: Any) -> int:
        """See `Spec`. Texts are read, and fractions of a float cut off, as in ComfyUI."""
        return int(_bounded(_converted(value, int, "a whole number"), self.low, self.high))


@dataclasses.dataclass(frozen=True)
class Number:
    """A number."""

    low: float
    high: float
    type: str = "FLOAT"
    default: float | None = None
    step: float = 0.01

    def check(self, value: Any) -> float:
        """See `Spec`."""
        number = _converted(value, float, "a number")
        if not math.isfinite(number):
            raise InputError("invalid_input_type", f"expected a finite number, got {shown(value)}")
        return float(_bounded(number, self.low, self.high))


@dataclasses.dataclass(frozen=True)
class Text:
    """A text."""

    type: str = "STRING"
    default: str = ""
    is_long: bool = False

    def check(self, value: Any) -> str:
        """See `Spec`."""
        if isinstance(value, (list, dict)) or value is None:
            raise InputError("invalid_input_type", f"expected a text, got {shown(value)}")
        return str(value)


@dataclasses.dataclass(frozen=True)
class Flag:
    """Yes or no."""

    type: str = "BOOLEAN"
    default: bool = False

    def check(self, value: Any) -> bool:
        """See `Spec`."""
        if not isinstance(value, (bool, int)):
            raise InputError("invalid_input_type", f"expected true or false, got {shown(value)}")
        return bool(value)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some texts."""

    options: Sequence[str]
    type: str = "COMBO"
    default: str | None = None

    def check(self, value: Any) -> str:
        """See `Spec`."""
        if value not in self.options:
            listed = ", ".join(self.options[:60])
            raise InputError("value_not_in_list", f"expected one of {listed}, got {shown(value)}")
        return str(value)


@dataclasses.dataclass(frozen=True)
class File:
    """The name of a file; `folder` is ComfyUI's name of the folder that it lies in."""

    folder: str
    type: str = "COMBO"
    default: None = None

    def check(self, value: Any) -> str:
        """See `Spec`; whether there is such a file, the run's files know."""
        if not isinstance(value, str) or not value:
            raise InputError("value_not_in_list", f"expected the name of a file, got {shown(value)}")
        return value


def _converted(value: Any, convert: Callable[[Any], float], what: str) -> float:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError("invalid_input_type", f"expected {what}, got {shown(value)}") from None


def _bounded(number: float, low: float, high: float) -> float:
    if number < low:
        raise InputError("value_smaller_than_min", f"expected at least {low}, got {number}")
    if number > high:
        raise InputError("value_bigger_than_max", f"expected at most {high}, got {number}")
    return number
