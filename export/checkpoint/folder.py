"""Reads the components of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from . import foreign
from .component import Component, read_json
from .safetensors_file import open_files

_CLASSES = {
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "tiny_vae": ("AutoencoderTiny",),
    "controlnet": ("ZImageControlNetModel",),
}


def _files(folder: Path) -> tuple[Path, ...]:
    """Files of a component: those in the index of shards, or else all safetensors files of the folder."""
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        shards = read_json(index[0]).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in shards.values()
        ):
            raise CheckpointError(f"{index[0]}: expected names of files in its folder under weight_map; fetch it again")
        files = tuple(folder / name for name in sorted(set(shards.values())))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{missing[0]} is missing, but {index[0].name} names it")
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file; other formats are not read")
    return files


def read_component(folder: Path, name: str) -> Component:
    """Reads a component of a diffusers folder.

    Raises:
        CheckpointError: it is missing, it is another model's, or its quantisation is not supported.
        TensorError: a tensor's number format, scale or quantisation metadata is not supported.
    """
    config = read_json(folder / "config.json")
    known = _CLASSES.get(name, ())
    found = config.get("_class_name")
    if known and found not in known:
        raise CheckpointError(f"{folder} is a {found}; expected a {' or '.join(known)}")
    if name == "text_encoder" and config.get("model_type") != "qwen3":
        raise CheckpointError(f"{folder} is a {config.get('model_type')!r} text encoder; Z-Image's is 'qwen3'")
    block = foreign.fp8_block(config, folder)
    files = _files(folder)
    tensors = open_files(files) if block is None else open_files(files, block)
    if name == "text_encoder":
        # The original's files are those of the causal language model, with its prefix.
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    return Component(name, config, tensors, files, folder)
