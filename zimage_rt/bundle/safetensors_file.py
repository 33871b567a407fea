"""A reader of safetensors files with numpy alone: a JSON header, then the tensors' bytes."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import shown_text
from .json_codec import parse_json

# Maximal bytes of a header, as in the safetensors library.
MAX_HEADER = 100_000_000

# numpy has no bfloat16: such tensors are uint16, the upper halves of their fp32 numbers.
_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

# Further formats of `read` and `number` with their numpy types; fp8 numbers are read as bytes.
_FLOATS: dict[str, type[np.generic]] = {**_STORED, "F64": np.float64, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8}
_INTEGERS: dict[str, type[np.generic]] = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8}
_INTEGERS |= {"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8}
_SIZES = {name: np.dtype(kind).itemsize for name, kind in {**_FLOATS, **_INTEGERS}.items()}


class TensorFile:
    """A memory-mapped safetensors file; a tensor's bytes are read from the disk on access.

    Args:
        path: the file.
        content: its bytes, if they are in memory already; the file is then not opened.

    Attributes:
        tensors: by name, the header's `dtype`, `shape` and `data_offsets`.
        metadata: the texts of the header's `__metadata__`.
        data_start: the offset in the file, in bytes, that `data_offsets` are relative to.

    Raises:
        ValueError: it is not a safetensors file, is shorter or longer than its header says, or its header names a
            tensor twice, or has tensors that overlap or leave gaps.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        size = path.stat().st_size if content is None else len(content)
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > MAX_HEADER or 8 + length > size:
                raise ValueError("not a safetensors file, or cut short")
            try:
                header = parse_json(file.read(length))
                if not isinstance(header, dict):
                    raise ValueError("it is no object")
                self.metadata: Mapping[str, str] = _metadata(header.pop("__metadata__", {}))
                self.tensors: Mapping[str, Any] = header
                end = _check_contiguous({name: _tensor_range(name, entry) for name, entry in header.items()})
            except ValueError as error:
                raise ValueError(f"its header is damaged ({shown_text(str(error))})") from error
        if 8 + length + end != size:
            what = "cut short" if 8 + length + end > size else "more bytes than its header tells of"
            raise ValueError(f"{what}: {size} bytes of {8 + length + end}")
        self.data_start: int = 8 + length
        if content is not None:
            self._bytes = np.frombuffer(content, np.uint8, offset=8 + length)
        else:
            self._bytes = np.memmap(path, np.uint8, "r", offset=8 + length) if end else np.empty(0, np.uint8)

    def dtype(self, name: str) -> str:
        """`F32`, `F16`, `BF16`, …"""
        return self.tensors[name]["dtype"]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensors[name]["shape"])

    def stored(self, name: str) -> np.ndarray:
        """The tensor in its stored format, bf16 as uint16. Raises ValueError for others than fp32/16, bf16 and int8."""
        dtype = {**_STORED, "I8": np.int8}.get(self.dtype(name))
        if dtype is None:
            raise ValueError(f"{name}: expected F32, F16, BF16 or I8, got {self.dtype(name)}")
        return self._array(name, dtype)

    def read(self, name: str) -> np.ndarray:
        """A floating-point tensor, including fp64 and fp8, converted to fp32.

        Raises ValueError for integer formats, which mean nothing without their scale.
        """
        format_name = self.dtype(name)
        if format_name not in _FLOATS:
            raise ValueError(f"{name}: expected {', '.join(_FLOATS)}, got {format_name}")
        array = self._array(name, _FLOATS[format_name])
        if format_name in _FP8:
            return _FP8[format_name][array]
        with np.errstate(over="ignore"):  # doubles beyond fp32 become inf, which callers refuse
            return widen(array)

    def number(self, name: str) -> float:
        """The number in a tensor of one element of any shape, floating-point or integer. Raises ValueError."""
        format_name = self.dtype(name)
        if self.shape(name).count(1) != len(self.shape(name)):
            raise ValueError(f"{name}: expected one number, got {list(self.shape(name))}")
        if format_name in _INTEGERS or format_name == "F64":
            return float(self._array(name, {**_FLOATS, **_INTEGERS}[format_name]).reshape(()))
        return float(self.read(name).reshape(()))

    def _array(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        first, last = self.tensors[name]["data_offsets"]
        # A copy, not a view of the mapping: offsets need not be aligned.
        return np.frombuffer(self._bytes[first:last].tobytes(), dtype).reshape(self.shape(name))


def widen(array: np.ndarray) -> np.ndarray:
    """Convert fp32, fp16 or bf16 (as uint16) to fp32, exactly; always a copy."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def narrow(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert fp32 to fp32, fp16 or bf16 (uint16), rounded to nearest even; numbers that are too large become inf."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return array.astype(dtype, copy=False)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _fp8_table(exponent_bits: int) -> np.ndarray:
    """The 256 numbers of an fp8 format in fp32, by byte: 4 exponent bits (e4m3fn, no inf) or 5 (e5m2)."""
    if exponent_bits == 5:  # the upper half of fp16
        return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size[byte & 127 == 127] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)


_FP8 = {"F8_E4M3": _fp8_table(4), "F8_E5M2": _fp8_table(5)}


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__: expected texts by name")
    return value


def _tensor_range(name: str, entry: Any) -> tuple[int, int]:
    """A tensor's first byte and its end, relative to the data. Raises ValueError unless its header entry is valid."""
    problem = ValueError(f"{name}: expected a dtype, a shape and data_offsets that belong together, got {entry}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise problem
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise problem
    first, last = offsets
    size = _SIZES.get(dtype)
    if first > last or (size is not None and last - first != math.prod(shape) * size):
        raise problem
    return first, last


def _are_sizes(values: Any) -> bool:
    """Whether the value is a list of non-negative integers below 2^63."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_contiguous(places: Mapping[str, tuple[int, int]]) -> int:
    """The end of the last tensor. Raises ValueError unless tensors are contiguous, as the format demands."""
    end, before = 0, "the beginning"
    for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, and {before} ends at {end}")
        end, before = last, name
    return end
