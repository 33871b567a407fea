"""Upscale models of a service by the names that workflows have for them."""

from __future__ import annotations

from pathlib import Path

from ...comfyui.files import find_file, list_files
from ...comfyui.inputs import InputError
from ..config import ServiceConfig

SUFFIXES = (".pth", ".pt", ".safetensors", ".sft")


def upscaler_folders(config: ServiceConfig) -> tuple[Path, ...]:
    """The folder of upscale models; empty if there is none."""
    folder = config.comfyui.upscalers
    return () if folder is None else (Path(folder),)


def find_upscaler(config: ServiceConfig, name: str) -> Path:
    """An upscale model's file. Raises InputError."""
    found = find_file(name, upscaler_folders(config))
    if found is None:
        listed = ", ".join(list_upscalers(config)) or "none"
        raise InputError(
            "value_not_in_list", f"there is no upscale model {name!r}; there are: {listed} (comfyui.upscalers)"
        )
    return found


def list_upscalers(config: ServiceConfig) -> list[str]:
    """The names of all upscale models' files."""
    return list_files(upscaler_folders(config), SUFFIXES)
