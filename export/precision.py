"""What is stored and computed in which number format, and how fp16 is kept from overflowing.

Inputs of Z-Image's post-norms (`attention_norm2`, `ffn_norm2`) reach 1e6 on the real weights, 15 times the largest
fp16 number. RMSNorm does not change when its input is scaled, if eps is scaled by the square, so everything that feeds
one is multiplied by a power of two on the way. That is exact: only exponents change.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Precision:
    """One of the three formats of a bundle.

    Attributes:
        name: `fp32`, `fp16` or `bf16`, as in the manifest.
        storage: dtype of the matrices in the weight files; vectors (norms, biases) always stay fp32.
        compute: dtype of the matrix products. Residual stream, norms, softmax, RoPE, timestep embedder and modulation
            are fp32 in every format.
        attention_scale: what `to_out`'s input is multiplied by.
        gate_scale, up_scale: what SiLU(w1 x) and w3 x are multiplied by before their product, which feeds `w2`.
        wide_values: attention's probabilities and values are rounded to `compute`, then multiplied as fp32 numbers.
        twin: what stands in for it when parity is measured, where ONNX Runtime cannot run its graph; the weight files
            of both are the same.
    """

    name: str
    storage: torch.dtype
    compute: torch.dtype
    attention_scale: float = 1.0
    gate_scale: float = 1.0
    up_scale: float = 1.0
    wide_values: bool = False
    twin: Precision | None = None

    @property
    def ffn_scale(self) -> float:
        """What the feed-forward's output is scaled by."""
        return self.gate_scale * self.up_scale


FP32 = Precision("fp32", torch.float32, torch.float32)
# 1/128 puts the limit at 65504 * 128 = 8.4e6; the real weights reach 9e5, and partial sums need room too.
FP16 = Precision("fp16", torch.float16, torch.float16, 2.0**-7, 2.0**-3, 2.0**-4)
# ONNX Runtime 1.32's CPU provider has no bf16 kernels ("Could not find an implementation" for MatMul, Mul, Add), so
# weights are stored in bf16 and widened behind each initialiser; the manifest's module config says so (`compute`).
BF16 = Precision("bf16", torch.bfloat16, torch.float32)

# TensorRT accumulates an attention's second product in fp16 if it has fp16 inputs; told that they are fp32, it still
# fuses, still multiplies them as the fp16 numbers they are, and accumulates in fp32 (seen in TensorRT-RTX 1.7's plans).
FP16_WIDE = dataclasses.replace(FP16, wide_values=True)
# bf16 as GPUs compute it.
BF16_NATIVE = dataclasses.replace(BF16, compute=torch.bfloat16, twin=BF16)

PRECISIONS = {precision.name: precision for precision in (FP32, FP16, BF16)}
