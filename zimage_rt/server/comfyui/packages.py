"""The packages of ComfyUI that the editor comes from, which are there with the extra `comfyui`."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from pathlib import Path

from ..config import ConfigError

FRONTEND, TEMPLATES = "comfyui-frontend-package", "comfyui-workflow-templates-json"
# The folders that are read, below that of a package's module.
FOLDERS = {FRONTEND: "static", TEMPLATES: "templates"}


@functools.cache
def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_of(package: str) -> Path:
    """The folder of a package's files; none of its code is run. Raises ConfigError."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if version_of(package) else None
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        folder = Path(place) / FOLDERS[package]
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"comfyui.editor: ComfyUI's editor needs {package}, which is not installed; install it with: "
        "pip install 'zimage-rt[comfyui]'"
    )
