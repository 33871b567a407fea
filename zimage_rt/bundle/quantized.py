"""Matrices that a bundle stores in 8 bits, as numbers: whole numbers or float8, a scale per column, and a rotation."""

from __future__ import annotations

import functools

import numpy as np

from .safetensors_file import TensorFile

# The formats of safetensors' headers.
QUANTIZED = ("I8", "F8_E4M3")
# Behind the name of a matrix: its scales, float32 `[out]`.
SCALE = "_scale"
# The rows of a matrix `[in, out]` that are rotated together, if there are so many (csrc/device/matrix.h).
GROUP = 256


@functools.cache
def rotation_matrix() -> np.ndarray:
    """The rotation, float32 `[256, 256]`: see `export.modeling.quantized`; it is its own inverse."""
    base = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < GROUP:
        matrix = np.kron(matrix, base)
    return matrix


def dequantized(file: TensorFile, name: str, columns: slice, *, rotates: bool) -> np.ndarray:
    """Columns of a matrix `[in, out]` in float32, rotated back if the module's config says that it `rotates`."""
    numbers = file.stored(name) if file.dtype(name) == "I8" else file.read(name)
    matrix = numbers[:, columns].astype(np.float32) * file.stored(f"{name}{SCALE}")[columns]
    if not rotates or len(matrix) % GROUP:
        return matrix
    return (rotation_matrix() @ matrix.reshape(-1, GROUP, matrix.shape[1])).reshape(matrix.shape)
