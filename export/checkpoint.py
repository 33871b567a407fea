"""Reads Z-Image checkpoints: a diffusers folder or the single files that ComfyUI uses, both seen as diffusers names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zimage_rt.manifest import shape_text

from .errors import CheckpointError, TensorError

PARTS = ("transformer", "text_encoder", "vae", "tiny_vae", "controlnet", "scheduler", "tokenizer")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays on disk until `load` is called."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Component:
    """One model of a checkpoint: its config.json and its tensors under diffusers' (or transformers') names."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    files: tuple[Path, ...]

    @property
    def elements(self) -> int:
        """How many weights it has."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The named tensor; raises TensorError if it is missing or has another shape."""
        tensor = self.tensors.get(name)
        where = ", ".join(str(file) for file in self.files)
        if tensor is None:
            raise TensorError(
                f"{self.name}: tensor {name!r} of shape {shape_text(shape)} is missing in {where}; "
                "the checkpoint is incomplete: download it again"
            )
        if tensor.shape != shape:
            raise TensorError(
                f"{self.name}: tensor {name!r}: expected {shape_text(shape)}, "
                f"got {shape_text(tensor.shape)} in {where}; config and weights do not belong together"
            )
        return tensor.load()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All parts of a Z-Image model. `tokenizer` is a folder; `tiny_vae`, `vae` and `controlnet` may be None."""

    format: str
    path: Path
    transformer: Component
    text_encoder: Component
    vae: Component | None
    tiny_vae: Component | None
    scheduler: Mapping[str, Any]
    tokenizer: Path
    controlnet: Component | None = None


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, mapped. Raises CheckpointError if it is damaged."""
    try:
        file = safe_open(path, framework="pt")
        return {
            name: LazyTensor(
                tuple(file.get_slice(name).get_shape()),
                lambda name=name: file.get_tensor(name),  # type: ignore[misc]
            )
            for name in file.keys()  # noqa: SIM118
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; the file is damaged or still being downloaded"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def folder_tensors(folder: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    """All tensors of a component's folder: an index of shards, or whatever safetensors files lie there."""
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        names = sorted(set(read_json(index[0])["weight_map"].values()))
        files = tuple(folder / name for name in names)
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{missing[0]} is missing, but {index[0].name} names it")
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file; other formats are not read")
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors.update(open_safetensors(file))
    return tensors, files


_CLASSES = {
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "tiny_vae": ("AutoencoderTiny",),
    "controlnet": ("ZImageControlNetModel",),
}


def read_component(folder: Path, name: str) -> Component:
    """One component of a diffusers folder."""
    config = read_json(folder / "config.json")
    known = _CLASSES.get(name, ())
    found = config.get("_class_name")
    if known and found not in known:
        raise CheckpointError(f"{folder} is a {found}; expected a {' or '.join(known)}")
    if name == "text_encoder" and config.get("model_type") != "qwen3":
        raise CheckpointError(f"{folder} is a {config.get('model_type')!r} text encoder; Z-Image's is 'qwen3'")
    tensors, files = folder_tensors(folder)
    if name == "text_encoder":
        # The original's files are those of the causal language model, with its prefix.
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    return Component(name, config, tensors, files)


def open_checkpoint(
    path: Path,
    parts: Mapping[str, Path] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: a diffusers folder, or a single `.safetensors` file.
        parts: other places for single parts (`PARTS`), e.g. where a single file has no tokenizer. A ControlNet is
            taken from here alone: nobody gets one for having it in the checkpoint's folder.
        config: numbers to change in the components' configs, e.g. what no tensor's shape shows.

    Raises:
        CheckpointError: there is none, or it is not Z-Image's.
    """
    parts = parts or {}
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file; give a Z-Image checkpoint")
    if path.is_file():
        from .single_file import open_single_file

        checkpoint = open_single_file(path, parts)
    else:
        checkpoint = _open_folder(path, parts)
    if "controlnet" in parts:
        from .controlnet import open_controlnet

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

    def place(name: str) -> Path:
        return parts.get(name, path / name)

    def optional(name: str) -> Component | None:
        return read_component(place(name), name) if place(name).is_dir() else None

    scheduler = place("scheduler")
    scheduler = scheduler / "scheduler_config.json" if scheduler.is_dir() else scheduler
    return Checkpoint(
        "diffusers",
        path,
        read_component(place("transformer"), "transformer"),
        read_component(place("text_encoder"), "text_encoder"),
        optional("vae"),
        optional("tiny_vae"),
        read_json(scheduler),
        place("tokenizer"),
    )


def float_tensors(component: Component, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything a reference model needs, loaded at once in one dtype."""
    return {name: tensor.load().to(dtype) for name, tensor in component.tensors.items()}
