"""The nodes that run here: a function each, whose signature says its inputs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .inputs import Spec

REQUIRED = inspect.Parameter.empty
# The type of an input or output that takes any.
ANY = "*"
# The names of the lazy inputs that a node needs, by the values of its others.
Chooses = Callable[[Mapping[str, Any]], Collection[str]]


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of a kind of node; `default` is REQUIRED if a workflow must fill it."""

    spec: Spec
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class NodeKind:
    """A kind of node.

    Attributes:
        name: its name in workflows.
        function: called with the run and the inputs by name; returns the outputs.
        inputs: by name.
        outputs: ComfyUI's types.
        is_output: whether a workflow is run for its sake.
        category: its place in ComfyUI's menu.
        chooses: of a switch: the names of the lazy inputs that it needs, by the values of the others; None needs all.
        lazy: the names of the inputs that are computed only if `chooses` names them.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    inputs: Mapping[str, Input]
    outputs: Sequence[str]
    is_output: bool
    category: str
    chooses: Chooses | None = None
    lazy: frozenset[str] = frozenset()


# All kinds, by name.
NODES: dict[str, NodeKind] = {}

Function = typing.TypeVar("Function", bound=Callable[..., tuple[Any, ...]])


def node(
    name: str,
    *outputs: str,
    category: str,
    is_output: bool = False,
    chooses: Chooses | None = None,
    lazy: Collection[str] = (),
) -> Callable[[Function], Function]:
    """Register a function as a kind of node; see `NodeKind`.

    Its first parameter is the run; the others are the inputs, `Annotated` with their `Spec`. It returns a tuple with a
    value per output.
    """

    def register(function: Function) -> Function:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        inputs = {
            parameter.name: Input(hints[parameter.name].__metadata__[0], parameter.default) for parameter in parameters
        }
        NODES[name] = NodeKind(name, function, inputs, outputs, is_output, category, chooses, frozenset(lazy))
        return function

    return register
