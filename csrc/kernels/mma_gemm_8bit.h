#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/dtype.h"

namespace zimage_rt {

// out [m, n] = alpha * (a [m, k] · weightᵀ) * row_scales[m] * column_scales[n] of 8-bit operands,
// the weight [n, k].
struct Gemm8bit {
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
  // Of mma_gemm_8bit: memory through which blocks add the sums of their parts of k; zero before the
  // first call, and used by one call at a time. Null: k is not split, so that few rows keep few
  // multiprocessors busy.
  void* workspace = nullptr;
};

// For any GPU of compute capability 8.0, with float8 of 8.9; kernels/fused_gemm.h and
// kernels/few_rows_gemm_8bit.h are faster on Hopper. On Hopper and later the kernel starts, and
// loads its weight, while the previous one drains: that one must not write the weight.
void mma_gemm_8bit(const Gemm8bit& args, cudaStream_t stream);

// For the current device.
std::size_t mma_gemm_8bit_workspace_bytes();

// Whether the current device runs it for `type`.
bool mma_gemm_8bit_runs_here(DType type);

}  // namespace zimage_rt
