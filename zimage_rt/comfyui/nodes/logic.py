"""Logic: switches, of which only the branch that is taken runs, and yes and no."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Flag, Text, Whole
from ..registry import ANY, node
from ..run import Run, Said
from .dynamic import AnyIn, AnyValue, filled, growing_node
from .primitives import LIMIT

OnOff = Annotated[bool, Flag()]
# ComfyUI's largest number of inputs in a group.
MAX_GROUP = 10
# Characters that PreviewAny shows.
MAX_SHOWN = 1 << 20


def _taken(given: Mapping[str, Any]) -> Collection[str]:
    return ["on_true" if given.get("switch") else "on_false"]


@node("ComfySwitchNode", ANY, category="logic", chooses=_taken, lazy=("on_false", "on_true"))
def switch(run: Run, switch: OnOff, on_false: AnyIn = None, on_true: AnyIn = None) -> tuple[Any, ...]:
    """One of two values. The nodes that lead to the other do not run."""
    del run
    return (on_true if switch else on_false,)


@node("ComfyNotNode", "BOOLEAN", category="logic")
def invert(run: Run, value: AnyIn) -> tuple[Any, ...]:
    """Whether a value is none, zero or empty."""
    del run
    return (not _is_true(value),)


@growing_node("ComfyAndNode", "BOOLEAN", category="logic", names=[f"value{at}" for at in range(MAX_GROUP)])
def every(run: Run, **values: AnyIn) -> tuple[Any, ...]:
    """Whether all values are true."""
    del run
    return (all(_is_true(value) for value in filled(values).values()),)


@growing_node("ComfyOrNode", "BOOLEAN", category="logic", names=[f"value{at}" for at in range(MAX_GROUP)])
def some(run: Run, **values: AnyIn) -> tuple[Any, ...]:
    """Whether one value is true."""
    del run
    return (any(_is_true(value) for value in filled(values).values()),)


@node("ComfyPassOrNoneNode", ANY, "BOOLEAN", category="logic")
def pass_or_none(run: Run, anything: AnyIn = None, default: AnyIn = None) -> tuple[Any, ...]:
    """A value, or another if there is none; and whether there is neither."""
    del run
    found = default if anything is None else anything
    return found, found is None


@node("CustomCombo", "STRING", "INT", category="utils")
def combo(run: Run, choice: Annotated[str, Text()], index: Annotated[int, Whole(-LIMIT, LIMIT)] = 0) -> tuple[Any, ...]:
    """One of the texts that the editor's user has listed, and its place."""
    del run
    return choice, index


@node("PreviewAny", "STRING", category="utils", is_output=True)
def preview(run: Run, source: Annotated[Any, AnyValue()]) -> tuple[Any, ...]:
    """Show a value as a text."""
    text = as_text(source)
    if len(text) > MAX_SHOWN:
        raise WorkflowError(f"source: expected a text of at most {MAX_SHOWN} characters, got {len(text)}")
    run.shown.append(Said(run.node, text))
    return (text,)


def as_text(value: Any) -> str:
    """A value as ComfyUI shows it: JSON of lists and objects; of models only their type, which names no file."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, np.ndarray):
        return f"{'x'.join(map(str, value.shape))} numbers:\n{value}"
    try:
        return json.dumps(value, indent=4)
    except (TypeError, ValueError):
        return f"<{type(value).__name__}>"


def _is_true(value: Any) -> bool:
    if isinstance(value, np.ndarray) and value.size != 1:
        raise WorkflowError(f"value: expected a number, a text or yes or no, got {value.size} numbers")
    return bool(value)
