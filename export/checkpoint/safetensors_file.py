"""Opens safetensors files, plain and quantised; tensors in an unknown number format are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from zimage_rt.lora.kinds import file_kind, remedy

from ..errors import CheckpointError, TensorError
from . import foreign
from .layouts import ALTERNATIVES, FLOATS, FP8, READERS, Layer, RawTensor, block_fp8, unmarked_scale
from .tensor import CheckpointTensor

# Last parts of names of scales and metadata. One that no layer uses is an error.
_SCALES = re.compile(
    r"(?:^|\.)(?:\w*_scale(?:_\w+)?|scale(?:_\w+)?|scales|scaled_fp8|comfy_quant|weight_(?:zeros?|correction|codebook|s_\w+)"
    r"|qweight|zero_point|quant_\w+)$"
)
_BLOCK = (128, 128)  # transformers' default without a config.json
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")


def tensor_names(path: Path) -> tuple[str, ...]:
    """Names of a file's tensors. Raises CheckpointError: the file is damaged, or its quantisation is not supported."""
    tensors, metadata = _raw(path)
    foreign.check_names(tensors, metadata, str(path))
    return tuple(tensors)


def open_safetensors(path: Path) -> dict[str, CheckpointTensor]:
    """Opens the tensors of a file, mapped.

    Raises:
        CheckpointError: the file is damaged, or its quantisation is not supported.
        TensorError: a tensor's number format, scale or quantisation metadata is not supported.
    """
    return open_files((path,))


def open_files(paths: Iterable[Path], block: tuple[int, int] = _BLOCK) -> dict[str, CheckpointTensor]:
    """Opens the shards of a component; `block` is the block size of transformers' fp8. Raises as `open_safetensors`."""
    raw: dict[str, RawTensor] = {}
    metadata: dict[str, str] = {}
    paths = tuple(paths)
    for path in paths:
        tensors, found = _raw(path)
        raw.update(tensors)
        metadata.update(found)
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    foreign.check_names(raw, metadata, where)
    return _resolve(raw, metadata, where, block)


def _raw(path: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    try:
        file = safe_open(path, framework="pt")
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            view = file.get_slice(name)
            tensors[name] = RawTensor(
                tuple(view.get_shape()),
                view.get_dtype(),
                lambda name=name: file.get_tensor(name),  # type: ignore[misc]
            )
        return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        kind = file_kind(path)
        if kind is not None:
            raise CheckpointError(
                f"{path} cannot be read: it seems to be {kind}; expected a safetensors file: {remedy(kind)}"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: {error}; the file is damaged or still being downloaded"
        ) from error


def _part(name: str) -> str:
    """The model of a single file that a tensor belongs to."""
    first = name.partition(".")[0]
    return first if first in ("text_encoders", "vae") else "transformer"


def _resolve(
    raw: Mapping[str, RawTensor], header: Mapping[str, str], where: str, block: tuple[int, int]
) -> dict[str, CheckpointTensor]:
    """Joins each tensor of values with its scales."""
    used: set[str] = set()
    result: dict[str, CheckpointTensor] = {}
    for name, metadata in _layer_metadata(raw, header, where, used).items():
        layer = Layer(name, raw, metadata, used, where)
        kind = metadata.get("format")
        reader = READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            layer.fail(f"its format {kind!r} is not read (known: {', '.join(READERS)})")
        result[f"{name}.weight"] = reader(layer)
    for name in raw:
        stem, _, leaf = name.rpartition(".")
        if name in used or leaf != "weight":
            continue
        for ending in ("weight_scale_inv", "weight_scale", "scale_weight"):
            if f"{stem}.{ending}" in raw:
                layer = Layer(stem, raw, {"format": f"a weight with {ending!r}"}, used, where)
                if raw[name].dtype not in (*FP8, *FLOATS):
                    layer.fail(f"{raw[name].dtype} with {ending!r} and no metadata that says how it was quantised")
                result[name] = block_fp8(layer, block) if ending.endswith("inv") else unmarked_scale(layer)
                break
    used.update(name for name in raw if name.rpartition(".")[2] == "scaled_fp8")  # a flag of ComfyUI's earlier files
    scaled = {_part(name) for name in raw if _SCALES.search(name)}
    for name, tensor in raw.items():
        if name in used:
            continue
        problem = None
        if _SCALES.search(name):
            problem = "it is a scale or metadata that its layer does not use"
        elif tensor.dtype in FP8 and _part(name) in scaled:
            problem = f"it is {tensor.dtype} without a scale, where other layers have one"
        elif tensor.dtype not in (*FLOATS, *FP8):
            problem = f"its number format {tensor.dtype} has no metadata that says what the numbers mean"
        if problem is not None:
            raise TensorError(f"{where}: tensor {name!r}: {problem}; {ALTERNATIVES}")
        result[name] = CheckpointTensor.plain(tensor.shape, tensor.read)
    return result


def _layer_metadata(
    raw: Mapping[str, RawTensor], header: Mapping[str, str], where: str, used: set[str]
) -> dict[str, Mapping[str, Any]]:
    """Metadata of each quantised layer, from `<layer>.comfy_quant` and the header's `_quantization_metadata`."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, tensor in raw.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            used.add(name)
            found[layer] = _object(tensor.read().contiguous().view(torch.uint8).numpy().tobytes(), f"{where}: {name!r}")
    text = header.get("_quantization_metadata")
    if text is None:
        return found
    here = f"{where}: '_quantization_metadata' of its header"
    layers = _object(text.encode(), here).get("layers")
    if not isinstance(layers, dict):
        raise TensorError(f"{here}: expected 'layers' as an object, got {layers!r}; {ALTERNATIVES}")
    for short, value in layers.items():
        metadata = {"format": value} if isinstance(value, str) else value
        layer = _full_name(short, raw, here)
        if not isinstance(metadata, dict) or found.get(layer, metadata) != metadata:
            raise TensorError(
                f"{here}: layer {short!r}: expected what its 'comfy_quant' says or {{'format': …}}, got {value!r}; "
                f"{ALTERNATIVES}"
            )
        found[layer] = metadata
    return found


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise TensorError(f"{where} is no JSON: {error}; {ALTERNATIVES}") from error
    if not isinstance(value, dict):
        raise TensorError(f"{where}: expected an object, got {value!r}; {ALTERNATIVES}")
    return value


def _full_name(layer: str, raw: Mapping[str, RawTensor], where: str) -> str:
    """A layer's name in the file; the header may omit or add the model's prefix."""
    bare = layer
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix)
    for name in (layer, bare, *(prefix + bare for prefix in _PREFIXES)):
        if f"{name}.weight" in raw:
            return name
    ending = f".{layer}.weight"
    found = [name.removesuffix(".weight") for name in raw if name.endswith(ending)]
    if len(found) == 1:
        return found[0]
    what = "no such layer is in the file" if not found else f"it may be any of {', '.join(sorted(found)[:3])}"
    raise TensorError(f"{where}: layer {layer!r}: {what}; {ALTERNATIVES}")
