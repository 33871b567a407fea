"""`/object_info` and what else ComfyUI tells of itself: its models, features and system."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ..._version import __version__
from ...bundle.safetensors_file import TensorFile
from ...comfyui import nodes
from ...comfyui.inputs import InputError
from ...comfyui.object_info import object_info
from ...comfyui.registry import NODES
from ..errors import NotFound
from ..jobs_api import CallerOf
from .lora_files import find_lora
from .packages import FRONTEND, TEMPLATES, version_of
from .prompt_api import FEATURES, WorkflowsOf

router = APIRouter(include_in_schema=False)

assert nodes.__all__  # importing them registers them
# The version of ComfyUI whose nodes and messages these are.
COMFYUI_VERSION = "0.33.0"


@router.get("/object_info")
async def all_nodes(workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """All nodes, with the files that they may choose."""
    images = workflows.folder(who.name)
    return {name: object_info(kind, lambda f: workflows.files.listed(f, images)) for name, kind in NODES.items()}


@router.get("/object_info/{name}")
async def one_node(name: str, workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """A node; empty if there is none of the name."""
    if name not in NODES:
        return {}
    images = workflows.folder(who.name)
    return {name: object_info(NODES[name], lambda folder: workflows.files.listed(folder, images))}


@router.get("/embeddings")
async def embeddings(who: CallerOf) -> list[str]:
    """None: Z-Image has no textual inversion."""
    return []


@router.get("/models")
async def folders(workflows: WorkflowsOf, who: CallerOf) -> list[str]:
    """The folders of models."""
    return workflows.files.folders()


@router.get("/models/{folder}")
async def models(folder: str, workflows: WorkflowsOf, who: CallerOf) -> JSONResponse:
    """The files of a folder."""
    if folder not in (*workflows.files.folders(), "unet", "clip"):
        return JSONResponse(None, 404)
    return JSONResponse(workflows.files.listed(folder))


@router.get("/experiment/models")
async def experiment_folders(workflows: WorkflowsOf, who: CallerOf) -> list[dict[str, Any]]:
    """The folders of models, as the editor's model library asks."""
    return [{"name": name, "folders": []} for name in workflows.files.folders()]


@router.get("/experiment/models/{folder}")
async def experiment_models(folder: str, workflows: WorkflowsOf, who: CallerOf) -> list[dict[str, Any]]:
    """The files of a folder, as the editor's model library asks."""
    if folder not in workflows.files.folders():
        raise NotFound(f"models: there is no folder {folder[:64]!r}")
    return [{"name": name, "pathIndex": 0} for name in workflows.files.listed(folder)]


@router.get("/view_metadata/{folder}")
async def metadata(folder: str, filename: str, workflows: WorkflowsOf, who: CallerOf) -> JSONResponse:
    """The texts in a LoRA's header; other files are bundles, and have none."""
    if folder != "loras" or not filename.endswith(".safetensors"):
        return JSONResponse(None, 404)
    try:
        return JSONResponse(read_metadata(workflows, filename))
    except (InputError, ValueError, OSError):
        return JSONResponse(None, 404)


def read_metadata(workflows: WorkflowsOf, filename: str) -> dict[str, str]:
    """The texts in the header of a LoRA's file. Raises InputError, ValueError, OSError."""
    return dict(TensorFile(find_lora(workflows.config, filename)).metadata)


@router.get("/extensions")
async def extensions(who: CallerOf) -> list[str]:
    """None: the editor's own are built in."""
    return []


@router.get("/features")
async def features(who: CallerOf) -> dict[str, Any]:
    """What this server supports of ComfyUI's newer protocol."""
    return dict(FEATURES)


@router.get("/system_stats")
async def system_stats(workflows: WorkflowsOf, who: CallerOf) -> dict[str, Any]:
    """The system, and a device per worker."""
    pages, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return {
        "system": {
            "os": sys.platform,
            "ram_total": pages,
            "ram_free": free,
            "comfyui_version": COMFYUI_VERSION,
            "required_frontend_version": version_of(FRONTEND),
            "installed_templates_version": version_of(TEMPLATES),
            "required_templates_version": version_of(TEMPLATES),
            "python_version": platform.python_version(),
            "pytorch_version": f"none (zimage_rt {__version__})",
            "embedded_python": False,
            "argv": ["zimage", "serve"],
        },
        "devices": workflows.devices(),
    }
