"""`CheckpointTensor`: one tensor of a checkpoint, with its number format, stored numbers and scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_CHUNK = 1 << 24  # numbers dequantised at once


class Stored(Protocol):
    """A tensor's numbers as the file has them, with what makes values of them."""

    @property
    def format(self) -> str:
        """The number format, as its writer calls it."""

    def values(self) -> Tensor:
        """What the numbers stand for."""

    def rows(self, first: int, count: int) -> Stored:
        """`count` rows from `first` on."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """Numbers that are the values themselves: fp64, fp32, fp16, bf16, or fp8 with no scale."""

    numbers: Tensor

    @property
    def format(self) -> str:
        """The dtype's name."""
        return str(self.numbers.dtype).removeprefix("torch.")

    def values(self) -> Tensor:
        """The numbers; fp8 as fp32, which holds each of them."""
        return self.numbers.float() if self.numbers.dtype.itemsize == 1 else self.numbers

    def rows(self, first: int, count: int) -> Plain:
        """See `Stored`."""
        return Plain(self.numbers[first : first + count])


def rotate(x: Tensor, size: int) -> Tensor:
    """Multiply each group of `size` columns of x [rows, columns] by ConvRot's matrix times √size.

    The matrix is symmetric and its own inverse up to that factor: the Kronecker power of a 4 x 4 matrix of signs
    (comfy-kitchen 0.2.40, `_build_hadamard`). With integers below 2^24 / size the fp32 result is exact.
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
    """A matrix [rows, columns] of few-bit numbers with scales; `values` is exact, rounded once to fp32.

    value = rotated((unpacked number x scale + zero) x tensor_scale) x column_scale

    Attributes:
        format: as its writer calls it.
        numbers: as stored, rows first; int8, fp8, or packed in uint8.
        scale: 0-dimensional, or [rows, groups] for equal groups of columns.
        unpack: makes [rows, columns] of `numbers`, exact in fp32.
        tensor_scale: a second factor for the whole tensor, 0-dimensional.
        zero: what is added, [rows, groups].
        rotation: columns are rotated in groups of this size (`rotate`); 0 where they are not.
        column_scale: what an activation is multiplied by before the product, [columns].
        input_scale: the scale an 8-bit product would give its input; the values do not depend on it.
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
        """[rows, columns], fp32."""
        # One row would do as a piece; a few million numbers keep the loop short and the memory small.
        count = max(1, _CHUNK // max(1, self.numbers[:1].numel()))
        pieces = [self.rows(i, count)._values() for i in range(0, self.numbers.shape[0], count)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _values(self) -> Tensor:
        x = self.unpack(self.numbers)
        if self.rotation and self.zero is None:
            # A row has one scale, so the integers can be rotated first, where fp32 is exact.
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
        """Whether fp32 arithmetic rounds a value only at its last product.

        It does with one scale of up to 24 bits. So it does with a second one if the first is fp8: its product with a
        number of few bits is exact.
        """
        if self.zero is not None or self.column_scale is not None or self.scale.dtype == torch.float64:
            return False
        return self.tensor_scale is None or self.scale.dtype.itemsize == 1


@dataclasses.dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that stays on disk until it is asked for.

    Attributes:
        shape: of the values.
        stored: reads the stored numbers and scales.
        alignment: rows and columns are padded with zeros to a multiple of this.
    """

    shape: tuple[int, ...]
    stored: Callable[[], Stored]
    alignment: int = 1

    @classmethod
    def plain(cls, shape: tuple[int, ...], load: Callable[[], Tensor]) -> CheckpointTensor:
        """A tensor whose numbers are its values."""
        return cls(shape, lambda: Plain(load()))

    def load(self) -> Tensor:
        """The values, exact in their dtype; those of few-bit formats in fp32."""
        return self.stored().values()

    def rows(self, first: int, count: int) -> CheckpointTensor:
        """`count` rows from `first` on."""
        return CheckpointTensor((count, *self.shape[1:]), lambda: self.stored().rows(first, count), self.alignment)

    def reshape(self, shape: tuple[int, ...]) -> CheckpointTensor:
        """The same values in another shape."""
        if shape == self.shape:
            return self
        return CheckpointTensor.plain(shape, lambda: self.load().reshape(shape))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the values have this shape, padding left out."""
        padded = tuple(-(-size // self.alignment) * self.alignment for size in shape)
        return self.shape == shape or (len(shape) == 2 and self.shape == padded)

    def load_as(self, shape: tuple[int, ...]) -> Tensor:
        """The values without padding; `shape` must fit."""
        values = self.load()
        return values if self.shape == shape else values[tuple(slice(size) for size in shape)]
