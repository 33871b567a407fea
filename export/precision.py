"""Storage and compute dtypes of each precision, and the scales that keep fp16 from overflowing.

Inputs of Z-Image's post-norms (`attention_norm2`, `ffn_norm2`) reach 1e6 on the real weights, 15 times the largest
fp16 number. RMSNorm is invariant to the scale of its input, if eps is scaled by its square. So inputs of post-norms are
multiplied by a power of two, which is exact: only exponents change.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The 8-bit format of the blocks' matrices.

    Attributes:
        name: in the module's config.
        storage: of their numbers: int8 or float8_e4m3fn.
        limit: the number that a column's largest value becomes.
        rotates: whether inputs and matrices are rotated; see `modeling.quantized`.
        per_token: whether a row of an input has a scale of its own; otherwise the whole input has one.
        text_encoder: whether the text encoder has 8 bits, too. A few of its channels are a thousand times larger than
            the others, which a scale per input does not bear.
        convolutions: whether the tiny VAE's decoder has 8 bits, too; see `graph.static_int8`.
    """

    name: str
    storage: torch.dtype
    limit: float
    rotates: bool
    per_token: bool
    text_encoder: bool = True
    convolutions: bool = False


@dataclasses.dataclass(frozen=True)
class Precision:
    """A number format of a bundle.

    Attributes:
        name: `fp32`, `fp16` or `bf16`, as in the manifest.
        storage: dtype of the matrices in the weight files; vectors (norms, biases) always stay fp32.
        compute: dtype of the matrix products. Residual stream, norms, softmax, RoPE, timestep embedder and modulation
            are fp32 in every format.
        attention_scale: factor of `to_out`'s input.
        gate_scale, up_scale: factors of SiLU(w1 x) and w3 x before their product, the input of `w2`.
        quantization: the format of the blocks' matrices in place of `storage`, if it has 8 bits. Embedders, adaLN,
            timestep embedder, final layer and VAE stay in `storage`.
        wide_values: attention's probabilities and values are rounded to `compute`, then multiplied as fp32 numbers.
        twin: the precision that parity measures instead, if ONNX Runtime cannot run this one's graphs; both have the
            same weight files.
    """

    name: str
    storage: torch.dtype
    compute: torch.dtype
    attention_scale: float = 1.0
    gate_scale: float = 1.0
    up_scale: float = 1.0
    wide_values: bool = False
    quantization: Quantization | None = None
    twin: Precision | None = None

    @property
    def ffn_scale(self) -> float:
        """Scale of the feed-forward's output."""
        return self.gate_scale * self.up_scale


FP32 = Precision("fp32", torch.float32, torch.float32)
# 1/128 puts the limit at 65504 * 128 = 8.4e6; the real weights reach 9e5, and partial sums need headroom.
FP16 = Precision("fp16", torch.float16, torch.float16, 2.0**-7, 2.0**-3, 2.0**-4)
# ONNX Runtime 1.32's CPU provider has no bf16 kernels ("Could not find an implementation" for MatMul, Mul, Add), so
# weights are stored in bf16 and cast to fp32 in the graph; `compute` of the manifest's module config says so.
BF16 = Precision("bf16", torch.bfloat16, torch.float32)

# TensorRT accumulates an attention's second product in fp16 if its inputs are fp16. With inputs cast to fp32 it still
# fuses and still multiplies fp16 numbers, but accumulates in fp32 (seen in plans of TensorRT-RTX 1.7).
FP16_WIDE = dataclasses.replace(FP16, wide_values=True)
# bf16 as GPUs compute it.
BF16_NATIVE = dataclasses.replace(BF16, compute=torch.bfloat16, twin=BF16)

# What is not in 8 bits is as in bf16. Rows have scales of their own, as GPUs compute it.
INT8 = dataclasses.replace(
    BF16, name="int8", quantization=Quantization("int8", torch.int8, 127.0, rotates=True, per_token=True)
)
# On a CPU a rotation costs as much as the product, and ONNX Runtime has a fused kernel for one scale per input.
INT8_CPU = dataclasses.replace(
    INT8,
    storage=torch.float32,
    quantization=Quantization(
        "int8", torch.int8, 127.0, rotates=False, per_token=False, text_encoder=False, convolutions=True
    ),
)
# float8's three bits of mantissa are as coarse after a rotation. ONNX Runtime has no product in it.
FP8 = dataclasses.replace(
    BF16, name="fp8", quantization=Quantization("float8", torch.float8_e4m3fn, 448.0, rotates=False, per_token=True)
)

PRECISIONS = {precision.name: precision for precision in (FP32, FP16, BF16, INT8, FP8)}
