"""`CheckpointTensor`: a tensor of a checkpoint with its number format, stored numbers and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_CHUNK = 1 << 24  # numbers dequantised at once


class Stored(Protocol):
    """A tensor as it is stored: numbers and, if it is quantised, scales."""

    @property
    def format(self) -> str:
        """Name of the number format in its writer's terms."""

    def values(self) -> Tensor:
        """The dequantised tensor."""

    def rows(self, first: int, count: int) -> Stored:
        """`count` rows, starting at `first`."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """An unquantised tensor: fp64, fp32, fp16, bf16, or fp8 without a scale."""

    numbers: Tensor

    @property
    def format(self) -> str:
        """The dtype's name."""
        return str(self.numbers.dtype).removeprefix("torch.")

    def values(self) -> Tensor:
        """The numbers; fp8 is converted to fp32, which is exact."""
        return self.numbers.float() if self.numbers.dtype.itemsize == 1 else self.numbers

    def rows(self, first: int, count: int) -> Plain:
        """See `Stored`."""
        return Plain(self.numbers[first : first + count])


def rotate(x: Tensor, size: int) -> Tensor:
    """Multiplies each group of `size` columns of x [rows, columns] by ConvRot's matrix times √size.

    The matrix is a Kronecker power of a 4 x 4 matrix of signs, symmetric, and its own inverse up to that factor
    (comfy-kitchen 0.2.40, `_build_hadamard`). For integers below 2^24 / size the fp32 result is exact.
    """
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=x.dtype)
    matrix = four
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, four)
    return (x.reshape(-1, size) @ matrix).reshape(x.shape)


def _whole(numbers: Tensor) -> Tensor:
    return numbers.float()


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [rows, columns] of few-bit numbers with scales; `values` rounds once, to fp32.

    value = rotated((unpacked number x scale + zero) x tensor_scale) x column_scale

    Attributes:
        format: name in its writer's terms.
        numbers: stored numbers, rows first; int8, fp8, or packed in uint8.
        scale: 0-dimensional, or [rows, groups] for equal groups of columns.
        unpack: converts `numbers` to [rows, columns], exact in fp32.
        tensor_scale: second factor of the whole tensor, 0-dimensional.
        zero: offset, [rows, groups].
        rotation: size of the groups of columns that are rotated (`rotate`); 0 for none.
        column_scale: factor of an activation's channels before the product, [columns].
        input_scale: scale of an 8-bit product's input; the values do not depend on it.
    """

    format: str
    numbers: Tensor
    scale: Tensor
    unpack: Callable[[Tensor], Tensor] = _whole
    tensor_scale: Tensor | None = None
    zero: Tensor | None = None
    rotation: int = 0
    column_scale: Tensor | None = None
    input_scale: Tensor | None = None

    def rows(self, first: int, count: int) -> Quantized:
        """See `Stored`."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor if tensor.ndim == 0 else tensor[first : first + count]

        zero = None if self.zero is None else cut(self.zero)
        return dataclasses.replace(self, numbers=cut(self.numbers), scale=cut(self.scale), zero=zero)

    def values(self) -> Tensor:
        """The dequantised matrix [rows, columns], fp32."""
        # A few million numbers at a time keep the memory small and the loop short.
        count = max(1, _CHUNK // max(1, self.numbers[:1].numel()))
        chunks = [self.rows(i, count)._values() for i in range(0, self.numbers.shape[0], count)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _values(self) -> Tensor:
        x = self.unpack(self.numbers)
        if self.rotation and self.zero is None:
            # A row has one scale, so the integers can be rotated first, which is exact in fp32.
            x = rotate(x, self.rotation)
        dtype = torch.float32 if self._rounds_once() else torch.float64
        root = self.rotation**0.5 if self.rotation else 1.0  # a power of two
        x, scale = x.to(dtype), self.scale.to(dtype) / root
        if scale.ndim == 0:
            x = x * scale
        else:
            x = x.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
            if self.zero is not None:
                x = x + (self.zero.to(dtype) / root).unsqueeze(-1)
            x = x.flatten(1)
        if self.tensor_scale is not None:
            x = x * self.tensor_scale.to(dtype)
        if self.rotation and self.zero is not None:
            x = rotate(x, self.rotation)
        if self.column_scale is not None:
            x = x * self.column_scale.to(dtype)
        return x.float()

    def _rounds_once(self) -> bool:
        """Whether fp32 arithmetic rounds only in its last product.

        True for a single scale of up to 24 bits. Also true for a second one after an fp8 scale, whose product with a
        few-bit number is exact.
        """
        if self.zero is not None or self.column_scale is not None or self.scale.dtype == torch.float64:
            return False
        return self.tensor_scale is None or self.scale.dtype.itemsize == 1


@dataclasses.dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that stays on the disk until `load`.

    Attributes:
        shape: shape of the values.
        stored: reads the stored numbers and scales.
        alignment: rows and columns are padded with zeros to a multiple of this.
    """

    shape: tuple[int, ...]
    stored: Callable[[], Stored]
    alignment: int = 1

    @classmethod
    def plain(cls, shape: tuple[int, ...], load: Callable[[], Tensor]) -> CheckpointTensor:
        """An unquantised tensor."""
        return cls(shape, lambda: Plain(load()))

    def load(self) -> Tensor:
        """Loads the values in their own dtype; quantised tensors in fp32."""
        return self.stored().values()

    def rows(self, first: int, count: int) -> CheckpointTensor:
        """`count` rows, starting at `first`."""
        return CheckpointTensor((count, *self.shape[1:]), lambda: self.stored().rows(first, count), self.alignment)

    def reshape(self, shape: tuple[int, ...]) -> CheckpointTensor:
        """The same values in another shape."""
        if shape == self.shape:
            return self
        return CheckpointTensor.plain(shape, lambda: self.load().reshape(shape))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the values have this shape without padding."""
        padded = tuple(-(-size // self.alignment) * self.alignment for size in shape)
        return self.shape == shape or (len(shape) == 2 and self.shape == padded)

    def load_as(self, shape: tuple[int, ...]) -> Tensor:
        """Loads the values without padding; `shape` must fit."""
        values = self.load()
        return values if self.shape == shape else values[tuple(slice(size) for size in shape)]
