"""Saving a workflow's images as ComfyUI does: their names, and the workflow inside."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..atomic_write import atomic_write
from ..image.formats import encode_image
from .graph import Graph, Link, WorkflowError
from .run import Made


def save_images(made: Sequence[Made], graph: Graph, folder: Path) -> list[Path]:
    """Write images as `PREFIX_00001_.png`, numbered on from those that are there; the files in their order.

    Previews go to the folder `temp` of it. Raises WorkflowError for a prefix that leads out of the folder.
    """
    text = json.dumps(to_api(graph), ensure_ascii=False)
    saved = []
    for image in made:
        place = PurePosixPath(image.prefix.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or not place.name:
            raise WorkflowError(f"filename_prefix: expected a name in the output folder, got {image.prefix!r}")
        parent = (folder / "temp" if image.is_preview else folder) / place.parent
        parent.mkdir(parents=True, exist_ok=True)
        path = parent / f"{place.name}_{_next_number(parent, place.name):05}_.png"
        atomic_write(path, encode_image(image.pixels, ".png", {"prompt": text}, ""))
        saved.append(path)
    return saved


def _next_number(folder: Path, prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}_(\d+)_?\.\w+")
    found = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in found if match), default=0) + 1


def to_api(graph: Graph) -> dict[str, dict[str, object]]:
    """A graph in API format."""
    return {
        node.id: {
            "class_type": node.kind,
            "inputs": {
                name: [value.node, value.output] if isinstance(value, Link) else value
                for name, value in node.inputs.items()
            },
            **({"_meta": {"title": node.title}} if node.title else {}),
        }
        for node in graph.values()
    }
