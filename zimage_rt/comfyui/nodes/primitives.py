"""Values as nodes."""

from __future__ import annotations

import math
from typing import Annotated, Any

from ..inputs import Choice, Flag, Number, Text, Whole
from ..registry import node
from ..run import Run

LIMIT = 2**63 - 1
# ResolutionSelector's names of aspect ratios, width by height.
RATIOS = {
    "1:1 (Square)": (1, 1), "3:2 (Photo)": (3, 2), "4:3 (Standard)": (4, 3), "16:9 (Widescreen)": (16, 9),
    "21:9 (Ultrawide)": (21, 9), "2:3 (Portrait Photo)": (2, 3), "3:4 (Portrait Standard)": (3, 4),
    "9:16 (Portrait Widescreen)": (9, 16),
}  # fmt: skip


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
def long_text(run: Run, value: Annotated[str, Text(is_long=True)]) -> tuple[Any, ...]:
    """A text of several lines."""
    del run
    return (value,)


@node("PrimitiveBoolean", "BOOLEAN", category="utils/primitive")
def flag(run: Run, value: Annotated[bool, Flag()]) -> tuple[Any, ...]:
    """Yes or no."""
    del run
    return (value,)


@node("ResolutionSelector", "INT", "INT", category="utils")
def resolution(
    run: Run,
    aspect_ratio: Annotated[str, Choice(tuple(RATIOS))] = "1:1 (Square)",
    megapixels: Annotated[float, Number(0.1, 16.0)] = 1.0,
    multiple: Annotated[int, Whole(1, 256)] = 8,
) -> tuple[Any, ...]:
    """Width and height of so many times 1024² pixels, rounded to a multiple."""
    del run
    ratio = RATIOS[aspect_ratio]
    unit = math.sqrt(megapixels * 1024 * 1024 / (ratio[0] * ratio[1]))
    width, height = (max(multiple, round(side * unit / multiple) * multiple) for side in ratio)
    return width, height
