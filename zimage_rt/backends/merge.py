"""Merging of LoRAs' changes into a bundle's stored tensors, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..bundle.quantized import SCALE
from ..bundle.safetensors_file import TensorFile, narrow, widen
from ..errors import BundleMismatch, LoraError
from .base import Change, Dense

# Multiplications per product. A block of the matrix in fp32 then stays in the cache between its passes, and OpenBLAS
# runs on one thread (its limit is 65536 * 4): waking more for so little took fifty times as long on a busy machine.
_CHUNK = 1 << 18


def merged(path: Path, changes: Sequence[Change]) -> dict[str, np.ndarray]:
    """The changed tensors of a weight file in their stored formats, bf16 as uint16: summed in fp32, then rounded.

    A matrix of int8 comes with its scales, which are those of the sum.

    Raises LoraError if fp16 cannot hold the result, and BundleMismatch if the file does not have a tensor.
    """
    by_tensor: dict[str, list[Change]] = {}
    for change in changes:
        by_tensor.setdefault(change.tensor, []).append(change)
    try:
        file = TensorFile(path)
        result: dict[str, np.ndarray] = {}
        for name, found in by_tensor.items():
            if file.dtype(name) == "I8":
                total = _merge(name, file.stored(name) * file.stored(f"{name}{SCALE}"), found)
                result[name], result[f"{name}{SCALE}"] = quantized_columns(total)
            else:
                result[name] = _merge(name, file.stored(name), found)
        return result
    except (KeyError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        raise BundleMismatch(f"{path}: {error}; export the bundle again") from error


def quantized_columns(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix `[in, out]` as int8 and scales float32 `[out]`: each its column's largest number / 127."""
    scales = np.abs(matrix).max(axis=0) / np.float32(127)
    return np.rint(matrix / np.where(scales > 0, scales, np.float32(1))).astype(np.int8), scales


def _merge(name: str, stored: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
    result = stored.copy()
    matrix = result[None] if result.ndim == 1 else result
    for change in changes:
        if isinstance(change, Dense):
            _add(matrix, change)
            continue
        rank, count = change.up.shape
        width = min(count, max(64, _CHUNK // (4 * rank)))
        height = max(4, _CHUNK // (width * rank))
        down = np.ascontiguousarray(change.down.T)  # [in, rank]
        for row in range(0, len(result), height):
            rows = slice(row, row + height)
            for first in range(0, count, width):
                up = change.up[:, first : first + width]
                columns = slice(change.first_column + first, change.first_column + first + up.shape[1])
                total = widen(result[rows, columns])
                total += down[rows] @ up
                result[rows, columns] = narrow(total, stored.dtype)
    if stored.dtype == np.float16 and not np.isfinite(result).all():
        raise LoraError(
            f"{name}: the LoRA's sum does not fit into fp16, which holds 65504; use smaller weights or a bf16 bundle"
        )
    return result


def _add(matrix: np.ndarray, change: Dense) -> None:
    """Add a full change in place, in blocks of rows, so that there is no copy of the matrix in fp32."""
    delta = change.make()
    if len(delta) != len(matrix) or change.first_column + delta.shape[1] > matrix.shape[1]:
        raise ValueError(f"{change.tensor}: no room for a change of {list(delta.shape)} in {list(matrix.shape)}")
    columns = slice(change.first_column, change.first_column + delta.shape[1])
    step = max(1, _CHUNK // delta.shape[1])
    for row in range(0, len(matrix), step):
        rows = slice(row, row + step)
        matrix[rows, columns] = narrow(widen(matrix[rows, columns]) + delta[rows], matrix.dtype)
