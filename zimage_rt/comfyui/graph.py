"""A workflow as a graph of nodes, in ComfyUI's API format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
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


def read_workflow(path: Path) -> Graph:
    """Read a workflow from a JSON file, or from a PNG that ComfyUI or this package saved. Raises WorkflowError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path}: cannot be read: {error.strerror or error}") from error
    if content.startswith(b"\x89PNG"):
        content = _prompt_of_png(path)
    if len(content) > MAX_BYTES:
        raise WorkflowError(f"{path}: expected at most {MAX_BYTES} bytes, got {len(content)}")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path}: expected a workflow as JSON: {error}") from error
    return parse_workflow(data, str(path))


def _prompt_of_png(path: Path) -> bytes:
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get("prompt")
    except Exception as error:  # Pillow has no error of its own for damaged files
        raise WorkflowError(f"{path}: cannot be read as an image: {error}") from error
    if not isinstance(text, str):
        raise WorkflowError(f"{path}: expected a PNG that carries a workflow (the text `prompt`), got one without")
    return text.encode()


def parse_workflow(data: Any, where: str = "workflow") -> Graph:
    """The graph of a workflow in API format, or in the editor's. Raises WorkflowError."""
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict) and "class_type" not in data["prompt"]:
        data = data["prompt"]  # the body of `POST /prompt`
    if not isinstance(data, dict) or not data:
        raise WorkflowError(f"{where}: expected an object with a node by id, got {shown(data)}", "no_prompt")
    graph = _editor_graph(data, where) if is_editor_format(data) else _api_graph(data, where)
    if len(graph) > MAX_NODES:
        raise WorkflowError(f"{where}: expected at most {MAX_NODES} nodes, got {len(graph)}")
    return graph


def is_editor_format(data: Mapping[str, Any]) -> bool:
    """Whether a workflow is in the format in which ComfyUI's editor saves files."""
    return isinstance(data.get("nodes"), list)


def _editor_graph(data: Mapping[str, Any], where: str) -> Graph:
    from .ui_format import read_editor_format  # it needs the kinds of nodes, which need this module

    return read_editor_format(data, where)


def _api_graph(data: Mapping[str, Any], where: str) -> Graph:
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
