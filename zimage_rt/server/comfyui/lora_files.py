"""LoRAs of a service's models by the names that workflows have for them."""

from __future__ import annotations

from pathlib import Path

from ...comfyui.files import find_file
from ...comfyui.inputs import InputError
from ..config import ServiceConfig


def lora_folders(config: ServiceConfig) -> tuple[Path, ...]:
    """The folders of all models' LoRAs, each once."""
    return tuple(dict.fromkeys(Path(model.loras) for model in config.models.values() if model.loras is not None))


def find_lora(config: ServiceConfig, name: str) -> Path:
    """A LoRA's file, with or without its ending. Raises InputError."""
    folders = lora_folders(config)
    found = find_file(name, folders) or find_file(f"{name}.safetensors", folders)
    if found is None:
        raise InputError("value_not_in_list", f"there is no LoRA {name!r} here (models.NAME.loras)")
    return found


def list_loras(config: ServiceConfig) -> list[str]:
    """The names of all LoRAs' files."""
    found = (
        path.relative_to(folder).as_posix()
        for folder in lora_folders(config)
        if folder.is_dir()
        for path in folder.rglob("*.safetensors")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(set(found))
