"""What the tests of single CUDA kernels share: bf16 and float8 in numpy, and how far a result is from its reference."""

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


def _e4m3_values() -> np.ndarray:
    """The float64 values of all 256 codes of e4m3: bias 7, no infinities, NaN at magnitude 0x7f."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[code & 0x7F == 0x7F] = np.nan
    return np.where(code < 128, values, -values)


E4M3 = _e4m3_values()


def to_float8(values: np.ndarray) -> np.ndarray:
    """Round float values to e4m3, ties to even, returned as the uint8 of its bits; saturates at 448."""
    between = (E4M3[:0x7E] + E4M3[1:0x7F]) / 2
    magnitude = np.abs(np.asarray(values, np.float64))
    code = np.searchsorted(between, magnitude)
    tie = (code < 0x7E) & (magnitude == between[np.minimum(code, 0x7D)])
    code += tie & (code % 2 == 1)
    return (code + 128 * np.signbit(values)).astype(np.uint8)


def to_float(values: np.ndarray) -> np.ndarray:
    """float64 values of a float32, float16, bf16 (uint16 bits), int8 or float8 (uint8 bits) array."""
    if values.dtype == np.uint8:
        return E4M3[values]
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
