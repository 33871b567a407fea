"""ComfyUI's templates that this service can run: those with nodes and model files that are here."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from ...comfyui.graph import Graph, WorkflowError
from ...comfyui.inputs import File
from ...comfyui.registry import NODES
from ...comfyui.workflow_file import parse_workflow
from .models import ModelFiles
from .packages import TEMPLATES, folder_of

log = logging.getLogger(__name__)

# The editor's lists of templates, one per language, and other files that it asks for by name.
INDEX = re.compile(r"index(\.[\w-]+)?\.json")
OTHERS = ("index_logo.json",)


class Templates:
    """The templates of the package, as files by name. Reading them takes half a second. Raises ConfigError."""

    def __init__(self, models: ModelFiles) -> None:
        folder = folder_of(TEMPLATES)
        self._files: dict[str, bytes] = {name: (folder / name).read_bytes() for name in OTHERS}
        listed = {
            path.name: _parsed(path.read_bytes()) for path in folder.glob("index*.json") if INDEX.match(path.name)
        }
        listed = {name: found for name, found in listed.items() if isinstance(found, list)}
        names = {template["name"] for category in listed["index.json"] for template in category["templates"]}
        self.names: list[str] = []
        for name in sorted(names):
            content = (folder / f"{name}.json").read_bytes()
            if can_run(_parsed(content), models):
                self.names.append(name)
                self._files[f"{name}.json"] = content
        for name, categories in listed.items():
            self._files[name] = json.dumps([each for each in map(self._category, categories) if each]).encode()

    def _category(self, category: Mapping[str, Any]) -> dict[str, Any] | None:
        """A category with the templates that run; None if it has none."""
        # `io` names sample images, which the editor would fetch from GitHub.
        templates = [
            {key: value for key, value in template.items() if key != "io"}
            for template in category["templates"]
            if template["name"] in self.names
        ]
        return {**category, "templates": templates} if templates else None

    def file(self, name: str) -> bytes | None:
        """A file by its name; None if there is none, as for the images of the cards, which another package has."""
        return self._files.get(name)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def can_run(workflow: Any, models: ModelFiles) -> bool:
    """Whether all nodes of a workflow are here, and all model files that they name."""
    try:
        graph = parse_workflow(workflow)
    except WorkflowError:
        return False
    return bool(graph) and all(node.kind in NODES for node in graph.values()) and not missing_files(graph, models)


def missing_files(graph: Graph, models: ModelFiles) -> list[str]:
    """The model files that a workflow names and the service does not have."""
    named = [
        (wanted.spec.folder, node.inputs[key])
        for node in graph.values()
        for key, wanted in NODES[node.kind].inputs.items()
        if isinstance(wanted.spec, File) and wanted.spec.folder != "input" and key in node.inputs
    ]
    return [name for folder, name in named if name not in models.listed(folder)]
