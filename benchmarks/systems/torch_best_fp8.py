"""Products of `torch_best` in fp8: e4m3 numbers with a scale per row of both operands, `torch._scaled_mm`.

Functions here are inlined into the compiled blocks, so that rows are quantised in the kernel that makes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT = torch.float8_e4m3fn
LIMIT = 448.0  # the format's largest number
LEAST = 1e-12  # of a row's largest magnitude, so that rows of zeros have a scale

# Numbers and fp32 scales, which have one column.
Quantized = tuple[Tensor, Tensor]
# A matrix [out, in] or activations [..., in], in 16 bits or quantised.
Matrix = Tensor | Quantized


def quantized_rows(x: Tensor) -> Quantized:
    """[..., columns] -> e4m3 numbers of the same shape, fp32 scales [..., 1]."""
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    return (x * (LIMIT / peak)).to(FORMAT), peak / LIMIT


def like_matrix(x: Tensor, matrix: Matrix) -> Matrix:
    """Activations in the format that a product with `matrix` takes."""
    return quantized_rows(x) if isinstance(matrix, tuple) else x


def linear(x: Matrix, matrix: Matrix) -> Tensor:
    """x [..., in], matrix [out, in], both quantised or neither -> [..., out]; bf16 if they are."""
    if isinstance(x, Tensor):
        assert isinstance(matrix, Tensor)
        return F.linear(x, matrix)
    numbers, scales = x
    columns, column_scales = matrix
    product = torch._scaled_mm(
        numbers.flatten(0, -2),
        columns.t(),
        scale_a=scales.flatten(0, -2),
        scale_b=column_scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product.unflatten(0, numbers.shape[:-1])
