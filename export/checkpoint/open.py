"""Opens checkpoints, diffusers folders and ComfyUI's single files alike, under diffusers' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .component import Checkpoint, Component, read_json
from .config_schema import SCHEMAS, check_config
from .controlnet import open_controlnet
from .folder import read_component
from .single_file import open_single_file


def open_checkpoint(
    path: Path,
    parts: Mapping[str, Path] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> Checkpoint:
    """Opens a checkpoint.

    Args:
        path: a diffusers folder, or a single `.safetensors` or `.gguf` file.
        parts: paths of parts (`PARTS`) outside of the checkpoint, e.g. the tokenizer of a single file. A ControlNet is
            only read from here, never from the checkpoint's folder.
        config: changes to the components' configs, e.g. numbers that no tensor's shape shows.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not Z-Image's.
    """
    parts = parts or {}
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file; give a Z-Image checkpoint")
    checkpoint = open_single_file(path, parts) if path.is_file() else _open_folder(path, parts)
    if "controlnet" in parts:
        controlnet = open_controlnet(parts["controlnet"], checkpoint.transformer)
        checkpoint = dataclasses.replace(checkpoint, controlnet=controlnet)
    for name, changes in (config or {}).items():
        old = getattr(checkpoint, name)
        if old is None:
            raise CheckpointError(f"[config.{name}]: the checkpoint has no {name}")
        changed: Any = (
            {**old, **changes} if name == "scheduler" else dataclasses.replace(old, config={**old.config, **changes})
        )
        checkpoint = _with(checkpoint, name, changed)
    for name in SCHEMAS:
        part = getattr(checkpoint, name)
        if part is not None:
            check_config(name, part if name == "scheduler" else part.config, f"{path}: the config of {name}")
    return checkpoint


def _with(checkpoint: Checkpoint, name: str, value: Any) -> Checkpoint:
    changes: dict[str, Any] = {name: value}
    return dataclasses.replace(checkpoint, **changes)


def _open_folder(path: Path, parts: Mapping[str, Path]) -> Checkpoint:
    index = path / "model_index.json"
    if not index.is_file() and not {"transformer", "text_encoder"} <= set(parts):
        config = path / "config.json"
        what = "it has no model_index.json"
        if config.is_file():
            found = read_json(config)
            what = f"it is a single model of class {found.get('_class_name') or found.get('architectures')}"
        raise CheckpointError(f"{path} is not a Z-Image checkpoint: {what}")
    if index.is_file():
        kind = read_json(index).get("_class_name", "?")
        if not str(kind).startswith("ZImage"):
            raise CheckpointError(f"{path} is not a Z-Image checkpoint: it is a {kind}; expected a ZImagePipeline")

    def path_of(name: str) -> Path:
        return parts.get(name, path / name)

    def optional(name: str) -> Component | None:
        return read_component(path_of(name), name) if path_of(name).is_dir() else None

    scheduler = path_of("scheduler")
    scheduler = scheduler / "scheduler_config.json" if scheduler.is_dir() else scheduler
    return Checkpoint(
        "diffusers",
        path,
        read_component(path_of("transformer"), "transformer"),
        read_component(path_of("text_encoder"), "text_encoder"),
        optional("vae"),
        optional("tiny_vae"),
        read_json(scheduler),
        path_of("tokenizer"),
    )
