"""Values as nodes."""

from __future__ import annotations

from typing import Annotated, Any

from ..inputs import Flag, Number, Text, Whole
from ..registry import node
from ..run import Run

LIMIT = 2**63 - 1


@node("PrimitiveInt", "INT", category="utils/primitive")
def whole(run: Run, value: Annotated[int, Whole(-LIMIT, LIMIT)]) -> tuple[Any, ...]:
    """A whole number."""
    del run
    return (value,)


@node("PrimitiveFloat", "FLOAT", category="utils/primitive")
def number(run: Run, value: Annotated[float, Number(-float(LIMIT), float(LIMIT))]) -> tuple[Any, ...]:
    """A number."""
    del run
    return (value,)


@node("PrimitiveString", "STRING", category="utils/primitive")
def text(run: Run, value: Annotated[str, Text()]) -> tuple[Any, ...]:
    """A text."""
    del run
    return (value,)


@node("PrimitiveStringMultiline", "STRING", category="utils/primitive")
def long_text(run: Run, value: Annotated[str, Text()]) -> tuple[Any, ...]:
    """A text of several lines."""
    del run
    return (value,)


@node("PrimitiveBoolean", "BOOLEAN", category="utils/primitive")
def flag(run: Run, value: Annotated[bool, Flag()]) -> tuple[Any, ...]:
    """Yes or no."""
    del run
    return (value,)
