"""What the tests of single CUDA kernels share: bf16 in numpy, and how far a result is from its float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def require_gpu() -> Any:
    """The `_cuda` module, or a skip of the whole test file that says what is missing."""
    cuda = pytest.importorskip("zimage_rt._cuda", reason="zimage_rt was built without CUDA (CONTRIBUTING.md)")
    if cuda.device_count() == 0:
        pytest.skip(f"no NVIDIA GPU here: {cuda.device_problem()}", allow_module_level=True)
    return cuda


def require_kernels() -> Any:
    """The `_cuda_kernels` module, which only builds in a working tree have, or a skip of the whole test file."""
    require_gpu()
    return pytest.importorskip("zimage_rt._cuda_kernels", reason="_cuda_kernels is not built: run make cuda")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float values to bf16, returned as the uint16 of its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float(values: np.ndarray) -> np.ndarray:
    """float64 values of a float32, float16 or bf16 (uint16 bits) array."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in `float32`, `float16` or `bfloat16`, as the kernels take them."""
    return to_bf16(values) if dtype == "bfloat16" else values.astype(dtype)


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """||out - reference|| / ||reference||; NaN in `out` gives NaN, which passes no test."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(to_float(out) - reference) / np.linalg.norm(reference))


# A result rounded once to the format: half a unit in the last place, and room for the order of sums.
TOLERANCE = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 5e-3}


def patches_of(latents: np.ndarray, patch: int = 2) -> np.ndarray:
    """The latents [samples, channels, height, width] as the transformer's tokens."""
    samples, channels, height, width = latents.shape
    rows = latents.reshape(samples, channels, height // patch, patch, width // patch, patch)
    return rows.transpose(0, 2, 4, 3, 5, 1).reshape(samples, -1, patch * patch * channels)
