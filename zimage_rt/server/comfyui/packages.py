"""The packages of ComfyUI that the editor comes from, which are there with the extra `comfyui`."""

from __future__ import annotations

import functools
import importlib.metadata

FRONTEND, TEMPLATES = "comfyui-frontend-package", "comfyui-workflow-templates-json"


@functools.cache
def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
