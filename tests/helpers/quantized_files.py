"""Quantised checkpoints for tests: each layout from chosen numbers and scales, with its values.

Written from the layouts' definitions, independently of export/checkpoint/: values are computed before packing, tiling
or rotation. tests/hardware/checkpoint_formats.py compares them with comfy-kitchen's own reader.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclasses.dataclass(frozen=True)
class Written:
    """One layer: its tensors by ending, its mark (None: none), and the values that they stand for."""

    tensors: Mapping[str, Tensor]
    mark: Mapping[str, Any] | None
    values: Tensor


def _written(tensors: Mapping[str, Any], mark: Mapping[str, Any] | None, values: np.ndarray) -> Written:
    made = {name: value if isinstance(value, Tensor) else torch.from_numpy(value) for name, value in tensors.items()}
    return Written(made, mark, torch.from_numpy(values.astype(np.float32)))


def hadamard(size: int) -> np.ndarray:
    matrix = FOUR
    while len(matrix) < size:
        matrix = np.kron(matrix, FOUR)
    return matrix / np.sqrt(size)


def rotated(weight: np.ndarray, size: int) -> np.ndarray:
    """W Hᵀ in groups of columns; H is symmetric."""
    return (weight.reshape(-1, size) @ hadamard(size).T).reshape(weight.shape)


def group_of(columns: int) -> int:
    """The largest group that fits; 0 if none does."""
    return next((size for size in (256, 64, 16) if columns % size == 0), 0)


def tiled(scales: np.ndarray) -> np.ndarray:
    """[rows, groups] -> cuBLAS' tiles of 128 x 4, padded."""
    rows, groups = scales.shape
    padded = -(-rows // 128) * 128, -(-groups // 4) * 4
    flat = np.zeros(padded[0] * padded[1], scales.dtype)
    row, group = np.indices(scales.shape)
    tile = row // 128 * (padded[1] // 4) + group // 4
    flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scales
    return flat.reshape(padded)


def padded(weight: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(weight, [(0, -size % multiple) for size in weight.shape])


def _fp8(numbers: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    stored = torch.from_numpy(numbers).to(dtype)
    return stored, stored.double().numpy()


def _scales(weight: np.ndarray, axis: int | None, top: float) -> np.ndarray:
    peak = np.abs(weight).max(axis=axis, keepdims=axis is not None)
    return (np.maximum(peak, 1e-12) / top).astype(np.float32)


def fp8(
    weight: np.ndarray,
    *,
    e5m2: bool = False,
    per_row: bool = False,
    names: tuple[str, str] = ("weight_scale", "input_scale"),
    marked: bool = True,
) -> Written:
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    scale = _scales(weight, 1 if per_row else None, float(torch.finfo(dtype).max))
    stored, numbers = _fp8(weight / scale, dtype)
    mark = {"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True} if marked else None
    tensors = {"weight": stored, names[0]: np.asarray(scale), names[1]: np.asarray(0.7, np.float32)}
    return _written(tensors, mark, numbers * scale.astype(np.float64))


def plain_fp8(weight: np.ndarray) -> Written:
    stored, numbers = _fp8(weight, torch.float8_e4m3fn)
    return _written({"weight": stored}, None, numbers)


def block_fp8(weight: np.ndarray, block: int = 128) -> Written:
    rows, columns = weight.shape
    grid = padded(weight, block)
    grid = np.abs(grid).reshape(grid.shape[0] // block, block, -1, block).max(axis=(1, 3))
    scale = (np.maximum(grid, 1e-12) / 448).astype(np.float32)
    wide = np.kron(scale.astype(np.float64), np.ones((block, block)))[:rows, :columns]
    stored, numbers = _fp8(weight / wide, torch.float8_e4m3fn)
    return _written({"weight": stored, "weight_scale_inv": scale}, None, numbers * wide)


def int8(weight: np.ndarray, *, rotate: bool = False, per_row: bool = True) -> Written:
    size = group_of(weight.shape[1]) if rotate else 0
    turned = rotated(weight, size) if size else weight
    scale = _scales(turned, 1 if per_row else None, 127)
    numbers = np.clip(np.rint(turned / scale), -127, 127).astype(np.int8)
    values = numbers * scale.astype(np.float64)
    mark: dict[str, Any] = {"format": "int8_tensorwise", "per_row": per_row}
    if size:
        mark |= {"convrot": True, "convrot_groupsize": size}
        values = rotated(values, size)
    return _written({"weight": numbers, "weight_scale": np.asarray(scale)}, mark, values)


def mxfp8(weight: np.ndarray) -> Written:
    rows, columns = weight.shape
    x = padded(weight, 32)
    groups = np.abs(x).reshape(x.shape[0], -1, 32).max(-1)
    exponents = np.clip(np.ceil(np.log2(np.maximum(groups / 448, 2.0**-126))), -127, 127)
    scale = np.repeat(np.exp2(exponents), 32, axis=1)
    stored, numbers = _fp8(x / scale, torch.float8_e4m3fn)
    stored_scale = torch.from_numpy(tiled((exponents + 127).astype(np.uint8))).view(torch.float8_e8m0fnu)
    return _written(
        {"weight": stored, "weight_scale": stored_scale}, {"format": "mxfp8"}, (numbers * scale)[:rows, :columns]
    )


def _nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The code of the level nearest to each number."""
    order = np.argsort(levels, kind="stable")
    return order[np.searchsorted((levels[order][1:] + levels[order][:-1]) / 2, x)]


def nvfp4(weight: np.ndarray, *, before: bool = False) -> Written:
    rows, columns = weight.shape
    x = padded(weight, 16)
    smooth = np.linspace(0.5, 2.0, x.shape[1]).astype(np.float32)
    x = x / smooth if before else x
    whole = _scales(x, None, 6 * 448)
    groups = np.abs(x).reshape(x.shape[0], -1, 16).max(-1)
    blocks, block_numbers = _fp8(np.minimum(groups / 6 / whole, 448), torch.float8_e4m3fn)
    scale = np.repeat(np.maximum(block_numbers, 1e-9), 16, axis=1) * whole.astype(np.float64)
    codes = _nearest(x / scale, E2M1)
    values = E2M1[codes] * np.repeat(block_numbers, 16, axis=1) * whole.astype(np.float64)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)  # the first value in the high half
    tensors: dict[str, Any] = {
        "weight": packed,
        "weight_scale": torch.from_numpy(tiled(blocks.view(torch.uint8).numpy())).view(torch.float8_e4m3fn),
        "weight_scale_2": np.asarray(whole),
        "input_scale": np.asarray(0.01, np.float32),
    }
    if before:
        tensors["pre_quant_scale"] = smooth
        values = values * smooth.astype(np.float64)
    return _written(tensors, {"format": "nvfp4"}, values[:rows, :columns])


def _low_first(codes: np.ndarray) -> np.ndarray:
    codes = codes & 15
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).view(np.int8)


def convrot_w4a4(weight: np.ndarray) -> Written | None:
    size = group_of(weight.shape[1])
    if not size:
        return None
    turned = rotated(weight, size)
    scale = _scales(turned, 1, 7)
    codes = np.clip(np.rint(turned / scale), -7, 7).astype(np.int64)
    mark = {"format": "convrot_w4a4", "convrot_groupsize": size, "linear_dtype": "int4"}
    values = rotated(codes * scale.astype(np.float64), size)
    return _written({"weight": _low_first(codes), "weight_scale": scale.reshape(-1)}, mark, values)


def awq_w4a16(weight: np.ndarray) -> Written | None:
    rows, columns = weight.shape
    if columns % 64:
        return None
    groups = weight.reshape(rows, -1, 64)
    zero = ((groups.max(-1) + groups.min(-1)) / 2).astype(np.float32)
    scale = (np.maximum(groups.max(-1) - groups.min(-1), 1e-9) / 15).astype(np.float32)
    codes = np.clip(np.rint((groups - zero[..., None]) / scale[..., None]) + 8, 0, 15).astype(np.int64)
    values = (codes - 8) * scale[..., None].astype(np.float64) + zero[..., None].astype(np.float64)
    return _written(
        {
            "weight": _low_first(codes.reshape(rows, columns)),
            "weight_scale": np.ascontiguousarray(scale.T),
            "weight_zeros": np.ascontiguousarray(zero.T),
        },
        {"format": "awq_w4a16", "group_size": 64},
        values.reshape(rows, columns),
    )


def asym_w4a8_int8(
    weight: np.ndarray, *, bits: int = 4, codebook: bool = True, corrected: bool = False
) -> Written | None:
    """Codes are drawn near the weights; what matters here is what codes and scales stand for."""
    rows, columns = weight.shape
    size = group_of(columns)
    if not size or columns % 32:
        return None
    turned = rotated(weight, size).reshape(rows, -1, 16)
    levels = np.linspace(-1, 1, 16).astype(np.float32) if codebook else np.arange(-8, 8, dtype=np.float32)
    if bits == 6:
        levels = np.arange(-32, 32, dtype=np.float32)
    by_group = np.abs(turned).max(-1) / np.abs(levels).max()
    by_row = (np.maximum(by_group.max(-1) * np.abs(levels).max(), 1e-9) / 127).astype(np.float32)
    relative, relative_numbers = _fp8(np.minimum(by_group / by_row[:, None], 448), torch.float8_e4m3fn)
    scale = np.maximum(relative_numbers, 1e-9)[..., None] * by_row[:, None, None]
    codes = _nearest((turned / scale).reshape(rows, columns), levels)
    grid = levels[codes].reshape(turned.shape) * relative_numbers.astype(np.float32)[..., None]
    numbers = np.clip(np.rint(grid), -127, 127).reshape(rows, columns)
    packed = _low_first(codes)
    if bits == 6:
        high = sum(codes[:, i::4] >> 4 << 2 * i for i in range(4))
        packed = np.concatenate([packed, high.astype(np.uint8).view(np.int8)], axis=1)
    tensors: dict[str, Any] = {"weight": packed, "weight_s_rel": relative, "weight_s_channel": by_row}
    if codebook and bits == 4:
        tensors["weight_codebook"] = levels
    values = numbers * by_row[:, None].astype(np.float64)
    if corrected:
        correction = (np.linspace(-0.1, 0.1, by_group.size).reshape(by_group.shape) * by_group).astype(np.float32)
        tensors["weight_correction"] = np.ascontiguousarray(correction.T)
        values = values + np.repeat(correction.astype(np.float64), 16, axis=1)
    mark = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": size}
    return _written(tensors, mark, rotated(values, size))


def legacy_fp8(weight: np.ndarray) -> Written:
    return fp8(weight, names=("scale_weight", "scale_input"), marked=False)


def lightx2v_fp8(weight: np.ndarray) -> Written:
    return fp8(weight, per_row=True, marked=False)


def _keyword(function: Callable[..., Written | None], **options: Any) -> Callable[[np.ndarray], Written | None]:
    return lambda weight: function(weight, **options)


LAYOUTS: Mapping[str, Callable[[np.ndarray], Written | None]] = {
    "plain-fp8": plain_fp8,
    "float8_e4m3fn": fp8,
    "float8_e5m2": _keyword(fp8, e5m2=True),
    "legacy-scaled-fp8": legacy_fp8,
    "lightx2v-fp8": lightx2v_fp8,
    "block-fp8": block_fp8,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
    "nvfp4-pre_quant_scale": _keyword(nvfp4, before=True),
    "int8_tensorwise": _keyword(int8, per_row=False),
    "int8_tensorwise-per-row": int8,
    "int8_convrot": _keyword(int8, rotate=True),
    "convrot_w4a4": convrot_w4a4,
    "awq_w4a16": awq_w4a16,
    "asym_w4a8_int8": asym_w4a8_int8,
    "asym_w4a8_int8-uniform": _keyword(asym_w4a8_int8, codebook=False),
    "asym_w4a8_int8-corrected": _keyword(asym_w4a8_int8, codebook=False, corrected=True),
    "asym_w6a8_int8": _keyword(asym_w4a8_int8, bits=6),
}


def quantize(
    tensors: Mapping[str, Tensor],
    layout: str,
    wanted: Callable[[str], bool],
    *,
    header: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """A file's tensors with the matrices that are `wanted` in a layout.

    Args:
        tensors: of the unquantised file.
        layout: of `LAYOUTS`.
        wanted: of a tensor's name.
        header: marks in the header's `_quantization_metadata`, without the model's prefix, in place of `comfy_quant`.

    Returns:
        The file's tensors; those of an unquantised fp32 file of the same values; the header's metadata.
    """
    file, plain, marks = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()
    for name, tensor in tensors.items():
        written = None
        if tensor.ndim == 2 and name.endswith(".weight") and wanted(name):
            written = LAYOUTS[layout](tensor.double().numpy())
        if written is None:
            file[name], plain[name] = tensor, tensor.float()
            continue
        layer = name.removesuffix(".weight")
        file.update({f"{layer}.{ending}": part for ending, part in written.tensors.items()})
        plain[name] = written.values
        if written.mark is not None:
            marks[layer] = written.mark
    if header:
        layers = {layer.removeprefix("model.diffusion_model."): mark for layer, mark in marks.items()}
        return file, plain, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    for layer, mark in marks.items():
        file[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(json.dumps(mark).encode()), dtype=torch.uint8)
    return file, plain, {}
