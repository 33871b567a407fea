"""Numbers: expressions, and their types."""

from __future__ import annotations

import math
import string
from typing import Annotated, Any

from ...checks import shown
from ..expression import evaluate
from ..graph import WorkflowError
from ..registry import node
from ..run import Run
from .dynamic import AnyIn, NumberValue, filled, growing_node
from .sockets import Prompt


@growing_node("ComfyMathExpression", "FLOAT", "INT", "BOOLEAN", category="utils", names=string.ascii_lowercase, least=0)
def math_expression(
    run: Run, expression: Prompt = "a + b", **values: Annotated[float | None, NumberValue()]
) -> tuple[Any, ...]:
    """The value of an expression of the inputs, as each type of number."""
    del run
    names = filled(values)
    for name, value in names.items():
        if not isinstance(value, (bool, int, float)):
            raise WorkflowError(f"values.{name}: expected a number, got {shown(value)}")
    found = evaluate(expression, names)
    return float(found), int(found), bool(found)


@node("ComfyNumberConvert", "FLOAT", "INT", category="utils")
def convert(run: Run, value: AnyIn) -> tuple[Any, ...]:
    """A number, yes or no, or the number that a text names, as both types of number."""
    del run
    try:
        if not isinstance(value, (bool, int, float, str)) or not math.isfinite(float(value)):
            raise ValueError
        return float(value), _whole(value)
    except (ValueError, OverflowError):
        raise WorkflowError(f"value: expected a finite number, got {shown(value)}") from None


def _whole(value: Any) -> int:
    try:
        return int(value)  # all digits of a long text, which a float has not
    except ValueError:
        return int(float(value))
