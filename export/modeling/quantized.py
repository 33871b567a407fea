"""Matrices in 8 bits: a scale per output column, activations quantised as they come, and a rotation before both.

A rotation by an orthonormal H changes no product, since (x H)(Hᵀ w) = x w, and spreads a channel that is far larger
than the others over its whole group, so that 8 bits hold both. H is the one of Comfy-Org's `int8_convrot` files:
Kronecker powers of a 4 x 4 matrix of ±1/2, symmetric and its own inverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import Precision, Quantization
from .layers import Linear, Part

# The columns that are rotated together; inputs of another width are not rotated (csrc/device/matrix.h).
GROUP = 256
# Kernels read so many 8-bit numbers at once.
MULTIPLE = 16
_BASE = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2


def rotation_matrix(size: int) -> Tensor:
    """H, float32 [size, size]; `size` is a power of 4."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, _BASE)
    if matrix.shape[0] != size:
        raise ValueError(f"rotation: expected a power of 4, got {size}")
    return matrix


def rotation_group(features: int, quantization: Quantization) -> int:
    """How many neighbouring columns of an input are rotated together; 0 for none."""
    return GROUP if quantization.rotates and features % GROUP == 0 else 0


def rotated(x: Tensor, group: int) -> Tensor:
    """x [..., features] with every `group` of columns multiplied by H."""
    if not group:
        return x
    return (x.unflatten(-1, (-1, group)) @ rotation_matrix(group).to(x.device)).flatten(-2)


def quantized_columns(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """A matrix [in, out] as 8-bit numbers [in, out] and fp32 scales [out], each its column's largest number / limit."""
    peak = weight.abs().amax(0)
    scale = peak / quantization.limit
    numbers = weight / torch.where(scale > 0, scale, 1.0)
    if quantization.storage == torch.int8:
        numbers = numbers.round()
    return numbers.to(quantization.storage), scale


class QuantizedLinear(Linear):
    """A matrix product in 8 bits; the weight is stored as [in, out] with `weight_scale`, fp32 [out].

    Its ONNX form multiplies whole numbers: the input is quantised per tensor or per row, as the precision says.
    """

    def __init__(self, in_features: int, outputs: int | tuple[Part, ...], precision: Precision) -> None:
        super().__init__(in_features, outputs, precision)
        assert precision.quantization is not None
        quantization = self.quantization = precision.quantization
        self.group = rotation_group(in_features, quantization)
        source, shape = self.sources["weight"], self.weight.shape
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=quantization.storage), requires_grad=False)
        self.weight_scale = torch.nn.Parameter(torch.empty(shape[1]), requires_grad=False)

        def assembled(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            matrix = source.assemble([matrix.float() for matrix in matrices])
            return quantized_columns(rotated(matrix.t(), self.group).t(), quantization)

        self.sources = {
            "weight": dataclasses.replace(source, assemble=lambda matrices: assembled(matrices)[0]),
            "weight_scale": dataclasses.replace(source, assemble=lambda matrices: assembled(matrices)[1]),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        x = rotated(x.float(), self.group)
        if self.quantization.storage != torch.int8:  # no ONNX form
            numbers, scale = quantized_columns(x.flatten(0, -2).T, self.quantization)
            y = (numbers.T.float() @ self.weight.float()) * scale[:, None] * self.weight_scale
            return y.unflatten(0, x.shape[:-1]).to(self.compute)
        y = torch.ops.zimage_rt.matmul_8_bits(x, self.weight, self.weight_scale, self.quantization.per_token)
        return y.to(self.compute)


@torch.library.custom_op("zimage_rt::matmul_8_bits", mutates_args=())
def matmul_8_bits(x: Tensor, weight: Tensor, scale: Tensor, per_token: bool) -> Tensor:
    """x fp32 [..., in] times 8-bit numbers [in, out] with a scale per column; x is quantised first."""
    if per_token:
        peak = x.abs().amax(-1, keepdim=True)
        step = peak / 127
        numbers = (x / torch.where(step > 0, step, 1.0)).round()
        return (numbers.double() @ weight.double()).float() * step * scale
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = torch.where(high > low, (high - low) / 255, 1.0)
    zero = (-low / step).round()
    numbers = (x / step).round() + zero
    return ((numbers.clamp(0, 255) - zero).double() @ weight.double()).float() * step * scale


@matmul_8_bits.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, per_token: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def linear(in_features: int, outputs: int | tuple[Part, ...], precision: Precision) -> Linear:
    """A block's matrix in the precision's format, which may be 8 bits."""
    if precision.quantization is None or in_features % MULTIPLE:
        return Linear(in_features, outputs, precision)
    return QuantizedLinear(in_features, outputs, precision)
