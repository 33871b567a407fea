"""Inputs that take values of several types, and groups of inputs: `values.a`, `values.b` and so on."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from ..inputs import Choice, InputError, Socket, Spec
from ..registry import ANY, NODES, Input, node

# Inputs of a node that joins batches.
MAX_BATCHES = 50

Function = TypeVar("Function", bound=Callable[..., tuple[Any, ...]])


@dataclasses.dataclass(frozen=True)
class AnyValue(Socket):
    """An input that takes a link to anything, or a value."""

    type: str = ANY

    def check(self, value: Any) -> Any:
        """See `Spec`."""
        return value


@dataclasses.dataclass(frozen=True)
class NumberValue(AnyValue):
    """An input that takes a link, or a number; a link's value is checked by the node."""

    def check(self, value: Any) -> Any:
        """See `Spec`."""
        if value is not None and not isinstance(value, (bool, int, float)):
            raise InputError("invalid_input_type", f"expected a number, got a {type(value).__name__}")
        return value


@dataclasses.dataclass(frozen=True)
class Branch(Choice):
    """A choice with inputs of its own for each option: `resize_type.width` and so on.

    Attributes:
        parts: their names, without the first, by option.
    """

    parts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of inputs that the editor lets grow.

    Attributes:
        name: of the group: `values`.
        names: what stands after the dot: `a`, `b` and so on.
        least: the number of them that a workflow must fill, from the first on.
        spec: the kind of each.
    """

    name: str
    names: Sequence[str]
    least: int
    spec: Spec


AnyIn = Annotated[Any, AnyValue()]
# The groups of the kinds of nodes that have one, by kind.
GROUPS: dict[str, Group] = {}


def add_inputs(name: str, inputs: Mapping[str, Input]) -> None:
    """Give a kind of node inputs whose names are none of Python's, in place of its function's `**` parameter."""
    kind = NODES[name]
    parameters = inspect.signature(kind.function).parameters.values()
    group = next(each.name for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD)
    named = {key: wanted for key, wanted in kind.inputs.items() if key != group}
    NODES[name] = dataclasses.replace(kind, inputs={**named, **inputs})


def growing_node(
    name: str, *outputs: str, category: str, names: Sequence[str], least: int = 1
) -> Callable[[Function], Function]:
    """Register a function whose last parameter is a group: `**values`, for inputs such as `values.a`.

    Args:
        name, outputs, category: see `node`.
        names, least: see `Group`.
    """

    def register(function: Function) -> Function:
        node(name, *outputs, category=category)(function)
        key, wanted = list(NODES[name].inputs.items())[-1]
        GROUPS[name] = Group(key, names, least, wanted.spec)
        grown = [f"{key}.{each}" for each in names]
        add_inputs(name, {each: wanted if at < least else Input(wanted.spec, None) for at, each in enumerate(grown)})
        return function

    return register


def filled(group: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group that a workflow fills, by what stands after the dot."""
    return {name.partition(".")[2]: value for name, value in group.items() if value is not None}
