"""Readers of quantised layers, a function per layout: stored numbers and scales of a layer -> `Quantized`.

The layouts are those of comfy-kitchen 0.2.40 with ComfyUI's metadata, ComfyUI's earlier scaled fp8, LightX2V's fp8 and
transformers' block fp8. docs/formats.md lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, MutableSet
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import TensorError
from .tensor import CheckpointTensor, Quantized

# Metadata keys that do not affect the values.
_REMARKS = frozenset({"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_row", "linear_dtype"})

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FLOATS = ("F64", "F32", "F16", "BF16")

ALTERNATIVES = "give the model's bf16, fp8, int8 (convrot), mxfp8, nvfp4 or GGUF file"


@dataclasses.dataclass(frozen=True)
class RawTensor:
    """A tensor of a safetensors file; `dtype` is the file's name, e.g. F8_E4M3."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantised layer: its name, all tensors of the file, its metadata, and the names that were read so far."""

    name: str
    tensors: Mapping[str, RawTensor]
    metadata: Mapping[str, Any]
    used: MutableSet[str]
    where: str

    def fail(self, problem: str) -> NoReturn:
        """Raise TensorError."""
        raise TensorError(f"{self.where}: layer {self.name!r}: {problem}; {ALTERNATIVES}")

    def find(self, *leaves: str) -> RawTensor | None:
        """The layer's tensor with the first of these endings that exists, or None."""
        for leaf in leaves:
            tensor = self.tensors.get(f"{self.name}.{leaf}")
            if tensor is not None:
                self.used.add(f"{self.name}.{leaf}")
                return tensor
        return None

    def require(self, *leaves: str, dtypes: tuple[str, ...] = ()) -> RawTensor:
        """As `find`. Raises TensorError: there is none, or its dtype is not in `dtypes`."""
        tensor = self.find(*leaves)
        if tensor is None:
            self.fail(f"{self.metadata['format']} needs {' or '.join(map(repr, leaves))}, which is missing")
        if dtypes and tensor.dtype not in dtypes:
            self.fail(f"{leaves[0]!r} of {self.metadata['format']}: expected {' or '.join(dtypes)}, got {tensor.dtype}")
        return tensor

    def matrix(self, *dtypes: str) -> RawTensor:
        """The weight. Raises TensorError: it is not a matrix of one of these dtypes."""
        weight = self.require("weight", dtypes=dtypes)
        if len(weight.shape) != 2:
            self.fail(f"expected a matrix, got {list(weight.shape)}")
        return weight

    def setting(self, name: str, default: Any) -> Any:
        """A value of the metadata, from its top level or its `params`."""
        params = self.metadata.get("params")
        return self.metadata.get(name, params.get(name, default) if isinstance(params, Mapping) else default)

    def settings(self, *known: str) -> None:
        """Raises TensorError: the metadata has other settings than `known`."""
        params = self.metadata.get("params")
        given = {*self.metadata, *(params if isinstance(params, Mapping) else ())} - {"params"}
        unknown = sorted(given - _REMARKS - set(known))
        if unknown:
            self.fail(
                f"its {self.metadata['format']} metadata has {', '.join(map(repr, unknown))}, which is not supported"
            )

    def count(self, name: str, default: int, *, power_of_four: bool = False) -> int:
        """A group size from the metadata. Raises TensorError: it is not a positive integer (or a power of 4)."""
        value = self.setting(name, default)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not whole or (power_of_four and (math.log2(value) % 2 or value < 4)):
            wanted = "a power of 4" if power_of_four else "a number above 0"
            self.fail(f"{name}: expected {wanted}, got {value!r}")
        return int(value)


def _per_row(layer: Layer, scale: RawTensor, rows: int) -> Callable[[], Tensor]:
    """Reader of a scale per tensor or per row, in the shape that `Quantized` needs."""
    if math.prod(scale.shape) == 1:
        return lambda: scale.read().reshape(())
    if scale.shape not in ((rows,), (rows, 1)):
        layer.fail(f"its scale: expected one number or one for each of {rows} rows, got {list(scale.shape)}")
    return lambda: scale.read().reshape(-1, 1)


def _read(tensor: RawTensor | None, shape: tuple[int, ...] | None = None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.read() if shape is None else tensor.read().reshape(shape)


def _divides(layer: Layer, columns: int, group: int) -> int:
    if columns % group:
        layer.fail(f"{columns} columns are no multiple of its groups of {group}")
    return columns // group


def _tiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [rows, columns] from cuBLAS' tiles of 128 x 4.

    Source: cuBLAS documentation, "1D Block Scaling Factors Layout": in a tile the scale of (row, column) is at
    row % 32 · 16 + row / 32 · 4 + column; tiles are ordered along the columns first.
    """
    tiles = (-(-rows // 128), -(-columns // 4))
    x = scales.reshape(*tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)  # tile row, row / 32, row % 32, tile column, column
    return x.reshape(tiles[0] * 128, tiles[1] * 4)[:rows, :columns]


def _check_tiles(layer: Layer, scale: RawTensor, rows: int, columns: int) -> None:
    wanted = -(-rows // 128) * 128 * (-(-columns // 4) * 4)
    if math.prod(scale.shape) != wanted:
        layer.fail(f"its block scales: expected {wanted} numbers in tiles of 128 x 4, got {list(scale.shape)}")


def float8(layer: Layer) -> CheckpointTensor:
    """`float8_e4m3fn`, `float8_e5m2`: value = number x weight_scale, a scale per tensor or per row (LightX2V)."""
    layer.settings()
    name = str(layer.metadata["format"])
    dtype = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[name]
    weight = layer.require("weight", dtypes=(dtype, "U8"))
    scale = layer.require("weight_scale", "scale_weight", dtypes=FLOATS)
    return _float8(layer, weight, scale, name)


def _float8(layer: Layer, weight: RawTensor, scale: RawTensor, name: str) -> CheckpointTensor:
    read_scale, inputs = _per_row(layer, scale, weight.shape[0]), layer.find("input_scale", "scale_input")

    def stored() -> Quantized:
        numbers = weight.read()
        if weight.dtype == "U8":
            numbers = numbers.view(getattr(torch, name))
        return Quantized(name, numbers, read_scale(), input_scale=_read(inputs))

    return CheckpointTensor(weight.shape, stored)


def unmarked_scale(layer: Layer) -> CheckpointTensor:
    """`weight_scale` (LightX2V) or ComfyUI's earlier `scale_weight` without metadata: value = number x scale.

    ComfyUI's earlier files also have a scale of 1 for weights in bf16.
    """
    weight = layer.require("weight", dtypes=(*FP8, *FLOATS))
    scale = layer.require("weight_scale", "scale_weight", dtypes=FLOATS)
    return _float8(layer, weight, scale, f"{weight.dtype} with a scale")


def block_fp8(layer: Layer, block: tuple[int, int]) -> CheckpointTensor:
    """transformers' block fp8: value = number x weight_scale_inv of the block."""
    weight = layer.matrix(*FP8)
    scale = layer.require("weight_scale_inv", dtypes=FLOATS)
    rows, columns = weight.shape
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if scale.shape != wanted:
        layer.fail(f"'weight_scale_inv': expected {list(wanted)} for blocks of {list(block)}, got {list(scale.shape)}")
    inputs = layer.find("activation_scale", "input_scale")

    def stored() -> Quantized:
        # A scale per column if the last block is not whole.
        by_row = scale.read().repeat_interleave(block[0], 0)[:rows]
        if columns % block[1]:
            by_row = by_row.repeat_interleave(block[1], 1)[:, :columns]
        return Quantized("fp8 in blocks", weight.read(), by_row, input_scale=_read(inputs))

    return CheckpointTensor(weight.shape, stored)


def int8_tensorwise(layer: Layer) -> CheckpointTensor:
    """int8 x weight_scale per tensor or row; with `convrot`, rotated in groups of columns."""
    layer.settings("convrot", "convrot_groupsize")
    weight = layer.require("weight", dtypes=("I8",))
    scale = layer.require("weight_scale", dtypes=FLOATS)
    rotation = _rotation(layer, weight.shape) if layer.setting("convrot", False) else 0
    read_scale, inputs = _per_row(layer, scale, weight.shape[0]), layer.find("input_scale")

    def stored() -> Quantized:
        return Quantized("int8_tensorwise", weight.read(), read_scale(), rotation=rotation, input_scale=_read(inputs))

    return CheckpointTensor(weight.shape, stored)


def _rotation(layer: Layer, shape: tuple[int, ...]) -> int:
    size = layer.count("convrot_groupsize", 256, power_of_four=True)
    if len(shape) != 2:
        layer.fail(f"convrot: expected a matrix, got {list(shape)}")
    _divides(layer, shape[1], size)
    return size


def mxfp8(layer: Layer) -> CheckpointTensor:
    """e4m3 x a power of two (e8m0) per 32 columns."""
    layer.settings("group_size")
    if layer.count("group_size", 32) != 32:
        layer.fail(f"group_size: expected 32, got {layer.setting('group_size', 32)}")
    weight = layer.matrix("F8_E4M3", "U8")
    scale = layer.require("weight_scale", dtypes=("F8_E8M0", "U8"))
    rows, columns = weight.shape
    groups = _divides(layer, columns, 32)
    _check_tiles(layer, scale, rows, groups)
    inputs = layer.find("input_scale")

    def stored() -> Quantized:
        exponents = _tiled(scale.read().view(torch.uint8), rows, groups).contiguous().view(torch.float8_e8m0fnu)
        numbers = weight.read().view(torch.float8_e4m3fn)
        return Quantized("mxfp8", numbers, exponents, input_scale=_read(inputs))

    return CheckpointTensor(weight.shape, stored, alignment=32)


def _pairs(levels: Iterable[float], *, high_first: bool = False) -> Tensor:
    """Table [256, 2] of the values of a byte's low and high half; with `high_first`, of its high and low half."""
    table, byte = torch.tensor(list(levels), dtype=torch.float32), torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]] if high_first else [table[byte & 15], table[byte >> 4]], -1)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_PAIRS = _pairs((*_E2M1, *(-x for x in _E2M1)), high_first=True)
_INT4_PAIRS = _pairs((*range(8), *range(-8, 0)))
_UINT4_PAIRS = _pairs(range(-8, 8))
_CODE_PAIRS = _pairs(range(16))


def _unpack(pairs: Tensor, packed: Tensor) -> Tensor:
    """Bytes [rows, columns / 2] -> fp32 [rows, columns]."""
    return pairs[packed.contiguous().view(torch.uint8).int()].flatten(1)


def nvfp4(layer: Layer) -> CheckpointTensor:
    """e2m1, two per byte, x an e4m3 per 16 columns x weight_scale_2 (x pre_quant_scale per column)."""
    layer.settings("group_size")
    if layer.count("group_size", 16) != 16:
        layer.fail(f"group_size: expected 16, got {layer.setting('group_size', 16)}")
    weight = layer.matrix("U8")
    scale = layer.require("weight_scale", dtypes=("F8_E4M3", "U8"))
    whole = layer.require("weight_scale_2", dtypes=FLOATS)
    if math.prod(whole.shape) != 1:
        layer.fail(f"'weight_scale_2': expected one number, got {list(whole.shape)}")
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    groups = _divides(layer, columns, 16)
    _check_tiles(layer, scale, rows, groups)
    inputs, before = layer.find("input_scale"), layer.find("pre_quant_scale")
    if before is not None and math.prod(before.shape) != columns:
        layer.fail(f"'pre_quant_scale': expected {columns} numbers, got {list(before.shape)}")

    def stored() -> Quantized:
        return Quantized(
            "nvfp4",
            weight.read(),
            _tiled(scale.read().view(torch.uint8), rows, groups).contiguous().view(torch.float8_e4m3fn),
            functools.partial(_unpack, _E2M1_PAIRS),
            tensor_scale=whole.read().reshape(()),
            column_scale=_read(before, (columns,)),
            input_scale=_read(inputs),
        )

    return CheckpointTensor((rows, columns), stored, alignment=16)


def convrot_w4a4(layer: Layer) -> CheckpointTensor:
    """Signed int4, two per byte with the first in the low half, x a scale per row, rotated."""
    layer.settings("convrot", "convrot_groupsize", "quant_group_size")
    weight = layer.matrix("I8", "U8")
    scale = layer.require("weight_scale", dtypes=FLOATS)
    shape = (weight.shape[0], 2 * weight.shape[1])
    rotation, read_scale = _rotation(layer, shape), _per_row(layer, scale, shape[0])
    unpack = functools.partial(_unpack, _INT4_PAIRS)
    return CheckpointTensor(
        shape, lambda: Quantized("convrot_w4a4", weight.read(), read_scale(), unpack, rotation=rotation)
    )


def awq_w4a16(layer: Layer) -> CheckpointTensor:
    """(uint4 - 8) x a scale + a zero per row and group of columns; both are stored as [groups, rows]."""
    layer.settings("group_size")
    weight = layer.matrix("I8", "U8")
    scale = layer.require("weight_scale", dtypes=FLOATS)
    zero = layer.require("weight_zeros", "weight_zero", dtypes=FLOATS)
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    wanted = (_divides(layer, columns, layer.count("group_size", 64)), rows)
    if not scale.shape == zero.shape == wanted:
        layer.fail(f"its scales and zeros: expected {list(wanted)}, got {list(scale.shape)} and {list(zero.shape)}")
    unpack = functools.partial(_unpack, _UINT4_PAIRS)
    return CheckpointTensor(
        (rows, columns),
        lambda: Quantized("awq_w4a16", weight.read(), scale.read().t(), unpack, zero=zero.read().t()),
    )


def asym_w4a8_int8(layer: Layer) -> CheckpointTensor:
    """4- or 6-bit codes of int8 numbers, x a scale per row (+ a correction), rotated.

    A code's level (from a codebook, or the code minus its midpoint) x weight_s_rel of its group, rounded, is the int8
    number of the product. The number of bits follows from the width of a row.
    """
    layer.settings("group_size", "convrot_groupsize", "bits", "symmetric", "codebook")
    weight = layer.matrix("I8", "U8")
    relative = layer.require("weight_s_rel", dtypes=("F8_E4M3", "U8", *FLOATS))
    by_row = layer.require("weight_s_channel", dtypes=FLOATS)
    codebook, correction = layer.find("weight_codebook"), layer.find("weight_correction")
    rows, width = weight.shape
    group = layer.count("group_size", 16)
    if len(relative.shape) != 2 or relative.shape[0] != rows:
        layer.fail(f"'weight_s_rel': expected one row of scales for each of {rows} rows, got {list(relative.shape)}")
    columns = relative.shape[1] * group
    bits = width * 8 // columns if columns else 0
    if bits not in (4, 6) or width * 8 != columns * bits or (bits == 6 and (codebook or correction)):
        layer.fail(f"rows of {width} bytes are no {columns} columns of 4 or 6 bits")
    if codebook is not None and codebook.shape != (16,):
        layer.fail(f"'weight_codebook': expected 16 levels, got {list(codebook.shape)}")
    if correction is not None and correction.shape != (relative.shape[1], rows):
        layer.fail(f"'weight_correction': expected {[relative.shape[1], rows]}, got {list(correction.shape)}")
    rotation, read_scale = _rotation(layer, (rows, columns)), _per_row(layer, by_row, rows)

    def stored() -> Quantized:
        packed = weight.read().view(torch.uint8)
        codes = _unpack(_CODE_PAIRS, packed[:, : columns // 2]).long()
        if bits == 6:
            high = packed[:, columns // 2 :].long()
            codes = codes | torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(1) << 4
        levels = codes.float() - 2 ** (bits - 1) if codebook is None else codebook.read().float()[codes]
        scales = relative.read()
        scales = scales.view(torch.float8_e4m3fn) if relative.dtype == "U8" else scales
        # In fp32, as comfy-kitchen rounds it.
        grid = levels.unflatten(1, (-1, group)) * scales.float().unsqueeze(-1)
        numbers = grid.flatten(1).round().clamp(-127, 127).to(torch.int8)
        scale = read_scale()
        zero = None
        if correction is not None:
            zero = correction.read().t()
            scale = scale.reshape(-1, 1).expand(rows, zero.shape[1])
        return Quantized("asym_w4a8_int8", numbers, scale, zero=zero, rotation=rotation)

    return CheckpointTensor((rows, columns), stored)


READERS: Mapping[str, Callable[[Layer], CheckpointTensor]] = {
    "float8_e4m3fn": float8,
    "float8_e5m2": float8,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
    "int8_tensorwise": int8_tensorwise,
    "convrot_w4a4": convrot_w4a4,
    "asym_w4a8_int8": asym_w4a8_int8,
    "awq_w4a16": awq_w4a16,
}
