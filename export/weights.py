"""Weight files: one safetensors file per module, written tensor by tensor, and external data of the ONNX graph."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from zimage_rt.bundle.manifest import LinearPlace

from .checkpoint import Component
from .errors import TensorError, disk_error
from .modeling.layers import Linear, Source, weight_sources

_DTYPES = {
    torch.float32: ("F32", ir.DataType.FLOAT),
    torch.float16: ("F16", ir.DataType.FLOAT16),
    torch.bfloat16: ("BF16", ir.DataType.BFLOAT16),
    torch.int8: ("I8", ir.DataType.INT8),
    torch.float8_e4m3fn: ("F8_E4M3", ir.DataType.FLOAT8E4M3FN),
}
_ALIGNMENT = 4096  # bytes; data that starts on a page needs no copy when the file is mapped


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Position of a tensor in its file: `offset` is in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(module: nn.Module, shared: Collection[str] = ()) -> tuple[bytes, dict[str, StoredTensor]]:
    """Header of a module's weight file and the position of each tensor; wider dtypes come first, for alignment.

    Tensors in `shared` are stored in another module's file and left out.
    """
    tensors = {name: tensor for name, tensor, _ in weight_sources(module) if name not in shared}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative, position = {}, 0
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        relative[name] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    start = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT
    text = text.ljust(start - 8)
    stored = {
        name: StoredTensor(tensors[name].dtype, tuple(tensors[name].shape), start + offset)
        for name, offset in relative.items()
    }
    return len(text).to_bytes(8, "little") + text, stored


def linear_places(module: nn.Module, shared: Collection[str] = ()) -> dict[str, LinearPlace]:
    """Position of each of the checkpoint's matrices in the stored tensors, by the layer's name in the checkpoint.

    Leaves out tensors in `shared`, as `layout` does.
    """
    places = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, Linear) or f"{path}.weight" in shared:
            continue
        parent, _, own = path.rpartition(".")
        first = 0
        for part in layer.parts:
            full = ".".join(filter(None, (parent, part.name.replace("{}", own))))
            places[full] = LinearPlace(f"{path}.weight", layer.weight.shape[0], first, part.size, part.head_dim)
            first += part.size
    return places


def write(
    module: nn.Module,
    component: Component,
    path: Path,
    advance: Callable[[int], None] = lambda size: None,
    shared: Collection[str] = (),
) -> None:
    """Writes a module's weights, with at most one tensor in memory.

    Args:
        module: on the meta device; its `sources` say how each tensor is made.
        component: the checkpoint's tensors.
        path: the file to write.
        advance: called after each tensor with its size in bytes.
        shared: names of tensors in another module's file, as in `layout`.
    """
    header, stored = layout(module, shared)
    sources = {name: source for name, _, source in weight_sources(module)}
    try:
        with path.open("wb") as file:
            file.write(header)
            for name, position in stored.items():
                tensor = _make(name, sources[name], component, position).reshape(-1)
                file.write(tensor.view(torch.uint8).numpy().data)
                advance(position.size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path) from error


def load(module: nn.Module, component: Component) -> nn.Module:
    """Fills a module with the tensors that `write` would store, to run it in torch. Returns the module."""
    _, stored = layout(module)
    tensors = {name: _make(name, source, component, stored[name]) for name, _, source in weight_sources(module)}
    module.load_state_dict(tensors, assign=True)
    return module


def _make(name: str, source: Source, component: Component, position: StoredTensor) -> Tensor:
    """Makes one stored tensor, contiguous and in its stored dtype."""
    parts = [component.read(part, shape) for part, shape in zip(source.names, source.shapes, strict=True)]
    tensor = source.assemble(parts)
    if tuple(tensor.shape) != position.shape:
        raise TensorError(f"{name}: expected shape {position.shape}, got {tuple(tensor.shape)}")
    result = tensor.to(position.dtype).contiguous()
    if position.dtype == torch.float16 and not bool(torch.isfinite(result).all()):
        peak = float(tensor.float().abs().max())
        raise TensorError(f"{name}: its largest value is {peak:g}, fp16 holds 65504; export with --precision bf16")
    return result


def attach(model: ir.Model, file_name: str, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Points the graph's initializers to the weight file as external data; the graph keeps its own constants."""
    for name, value in list(model.graph.initializers.items()):
        position = stored.get(name)
        if position is None:
            continue
        value.const_value = ir.ExternalTensor(
            location=file_name,
            offset=position.offset,
            length=position.size,
            dtype=_DTYPES[position.dtype][1],
            shape=ir.Shape(position.shape),
            name=name,
            base_dir=folder,
        )
