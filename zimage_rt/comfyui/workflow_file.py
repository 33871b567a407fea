"""Workflows from files and from bodies, in each of ComfyUI's two formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import shown
from .graph import MAX_BYTES, MAX_NODES, Graph, WorkflowError, parse_api
from .ui_format import read_editor_format


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
    graph = read_editor_format(data, where) if is_editor_format(data) else parse_api(data, where)
    if len(graph) > MAX_NODES:
        raise WorkflowError(f"{where}: expected at most {MAX_NODES} nodes, got {len(graph)}")
    return graph


def is_editor_format(data: Mapping[str, Any]) -> bool:
    """Whether a workflow is in the format in which ComfyUI's editor saves files."""
    return isinstance(data.get("nodes"), list)
