"""Low-rank changes added to a bundle's stored tensors, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import BundleMismatch, LoraError
from ..tensor_file import TensorFile, narrow, widen
from .base import LowRank

# Rows made at a time: a piece of a matrix in fp32 then stays in the cache between its four passes.
_ROWS = 64


def merged(path: Path, changes: Sequence[LowRank]) -> dict[str, np.ndarray]:
    """The changed tensors of a weight file in their stored formats, bf16 as uint16: summed in fp32, then rounded.

    Raises LoraError where fp16 cannot hold the result.
    """
    by_tensor: dict[str, list[LowRank]] = {}
    for change in changes:
        by_tensor.setdefault(change.tensor, []).append(change)
    try:
        file = TensorFile(path)
        return {name: _merge(name, file.stored(name), found) for name, found in by_tensor.items()}
    except (KeyError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        raise BundleMismatch(f"{path}: {error}; export the bundle again") from error


def _merge(name: str, stored: np.ndarray, changes: Sequence[LowRank]) -> np.ndarray:
    result = stored.copy()
    for change in changes:
        columns = slice(change.first_column, change.first_column + change.up.shape[1])
        down = np.ascontiguousarray(change.down.T)  # [in, rank]
        for row in range(0, len(result), _ROWS):
            rows = slice(row, row + _ROWS)
            total = widen(result[rows, columns])
            total += down[rows] @ change.up
            result[rows, columns] = narrow(total, stored.dtype)
    if stored.dtype == np.float16 and not np.isfinite(result).all():
        raise LoraError(
            f"{name}: the LoRA's sum does not fit into fp16, which holds 65504; use smaller weights or a bf16 bundle"
        )
    return result
