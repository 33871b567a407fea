#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"

namespace zimage_rt {

// out [m, n] = alpha * (a [m, k] · weightᵀ) * row_scales[m] * column_scales[n] of 8-bit operands,
// the weight [n, k]. For any GPU of compute capability 8.0, with float8 of 8.9;
// kernels/fused_gemm.h is faster on Hopper for many rows.
struct MmaGemm8bit {
  const void* a;
  const float* row_scales;
  const void* weight;
  const float* column_scales;
  DType type;  // of a and the weight: int8 or float8
  void* out;
  DType out_type;  // fp32, fp16 or bf16
  int m;
  int n;  // a multiple of 8
  int k;  // a multiple of 16
  float alpha;
};
void mma_gemm_8bit(const MmaGemm8bit& args, cudaStream_t stream);

// Whether the current device runs it for `type`.
bool mma_gemm_8bit_runs_here(DType type);

}  // namespace zimage_rt
