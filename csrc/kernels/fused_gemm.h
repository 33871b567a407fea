#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/dtype.h"

namespace zimage_rt {

// Matrix products of Hopper's own making, with what follows them done on the fp32 sums: nothing is
// written and read again between the two. For many rows; cuBLASLt is better for few.

// Whether this device runs these kernels.
bool fused_gemm_runs_here();

// Of the workspace that products on one stream share; zeros before the first of them.
std::size_t fused_gemm_workspace_bytes();

// How the blocks that share tiles stand: two above one another, or two side by side.
enum class ClusterShape { kAny, kTall, kWide };

// a [m, k] · weight [k, n], both row-major; a turned weight lies as [n, k].
struct FusedGemm {
  const void* a;
  const void* weight;
  void* out;
  DType type;  // of all three: fp16 or bf16
  int m;
  int n;  // a multiple of 64
  int k;  // a multiple of 8
  void* workspace;
  bool turned;
  ClusterShape cluster = ClusterShape::kAny;  // any: the fastest known
};

// out [m, n / 2] = silu(gate) * up * scale; the weight holds the gate's columns, then those of up.
// n / 2 is a multiple of 64.
void gemm_swiglu(const FusedGemm& args, float scale, cudaStream_t stream);

// out [m, n]: queries, keys and values of heads of 128 columns; the former two normed (RMSNorm,
// fp32 weights [128], both null for none) and turned as qk_norm_rope does.
struct QkNormRopeOf {
  const float* q_weight;
  const float* k_weight;
  const float* cos;  // [m, 64]
  const float* sin;
  int q_heads;
  int k_heads;
  float eps;
};
void gemm_qk_norm_rope(const FusedGemm& args, const QkNormRopeOf& after, cudaStream_t stream);

}  // namespace zimage_rt
