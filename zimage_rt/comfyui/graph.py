"""A workflow as a graph of nodes, in ComfyUI's API format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..checks import shown
from ..errors import ZImageError

# Nodes of one workflow, and bytes of its file.
MAX_NODES, MAX_BYTES = 10_000, 32 << 20


class WorkflowError(ZImageError):
    """A workflow cannot be read, or cannot run here.

    Attributes:
        kind: ComfyUI's type of the error.
        node_errors: by node id, in the shape of ComfyUI's `node_errors`.
    """

    code = "invalid_workflow"

    def __init__(
        self, message: str, kind: str = "invalid_prompt", node_errors: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.node_errors = kind, dict(node_errors or {})


@dataclasses.dataclass(frozen=True)
class Link:
    """An input that is another node's output: its id and the number of the output."""

    node: str
    output: int


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a workflow; its inputs are values or `Link`s."""

    id: str
    kind: str
    inputs: Mapping[str, Any]
    title: str = ""

    @property
    def label(self) -> str:
        """The node for a message: its title, if it has one, its kind and its id."""
        return f"{self.title or self.kind} (#{self.id})"


Graph = Mapping[str, Node]


def parse_api(data: Mapping[str, Any], where: str) -> Graph:
    """The graph of a workflow in API format. Raises WorkflowError."""
    return {str(name): _node(str(name), value, where) for name, value in data.items()}


def _node(name: str, value: Any, where: str) -> Node:
    if not isinstance(value, dict) or not isinstance(value.get("class_type"), str):
        raise WorkflowError(f"{where}: node #{name[:64]}: expected an object with class_type, got {shown(value)}")
    inputs = value.get("inputs", {})
    if not isinstance(inputs, dict):
        raise WorkflowError(f"{where}: node #{name[:64]}: inputs: expected an object, got {shown(inputs)}")
    meta = value.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    parsed = {key: _input(item) for key, item in inputs.items()}
    return Node(name, value["class_type"], parsed, title if isinstance(title, str) else "")


def _input(value: Any) -> Any:
    """A value, or a Link if it is a list of a node's id and the number of its output."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    if is_link and isinstance(value[1], int) and not isinstance(value[1], bool):
        return Link(value[0], value[1])
    return value
