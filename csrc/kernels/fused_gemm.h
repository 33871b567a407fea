#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

// Matrix products for Hopper with fused epilogues, which work on the fp32 sums: the product itself
// is never written to memory. For many rows; cuBLASLt is faster for few.

// Whether the current device runs these kernels.
bool fused_gemm_runs_here();

// Bytes of the workspace that all products on one stream share; zero-filled before the first.
std::size_t fused_gemm_workspace_bytes();

// Blocks of a cluster along m and n.
enum class ClusterShape { kAny, k2x1, k1x2 };

// The product of a [m, k] and a weight [k, n], both row-major; the weight is [n, k] in memory with
// Layout::kOutIn. Operands of 8 bits, K-major alone, have scales: the product is the sums times
// row_scales[m] * column_scales[n].
struct FusedGemm {
  const void* a;
  const void* weight;
  void* out;
  DType type;  // of a and the weight, and if it has 16 bits, of out
  int m;
  int n;  // a multiple of 64
  int k;  // a multiple of 8, with 8 bits of 16
  void* workspace;
  Layout layout;
  ClusterShape cluster = ClusterShape::kAny;  // kAny: the one that is expected to be fastest
  DType out_type = DType::kBFloat16;          // with 8-bit operands
  const float* row_scales = nullptr;
  const float* column_scales = nullptr;
};

// out [m, n] = alpha * product of 8-bit operands, in fp32, fp16 or bf16. cuBLASLt computes those of
// 16 bits.
void gemm_8bit(const FusedGemm& args, float alpha, cudaStream_t stream);

// out [m, n / 2] = silu(gate) * up * scale; the weight holds the columns of the gate, then those of
// up. n / 2 is a multiple of 64.
void gemm_swiglu(const FusedGemm& args, float scale, cudaStream_t stream);

// out [m, n]: queries, keys and values of heads of 128 columns. Queries and keys are normed
// (RMSNorm, fp32 weights [128], both null for none) and rotated as in qk_norm_rope.
struct FusedQkNormRope {
  const float* q_weight;
  const float* k_weight;
  const float* cos;  // [m, 64]
  const float* sin;
  int q_heads;
  int k_heads;
  float eps;
};
void gemm_qk_norm_rope(const FusedGemm& args, const FusedQkNormRope& heads, cudaStream_t stream);

}  // namespace zimage_rt
