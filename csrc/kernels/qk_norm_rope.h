#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// RMSNorm of every query and key head, then rotary embedding, in place, in one pass over
// qkv [rows, row_stride]: a row holds q_heads queries, k_heads keys and the values, heads of
// head_dim (64 or 128). Rotated pairs are halves: (i, i + head_dim / 2).
struct QkNormRope {
  void* qkv;
  std::int64_t row_stride;  // elements
  DType type;
  const float* q_weight;  // [head_dim]; null: no norm, rotation alone
  const float* k_weight;
  const float* cos;  // [rows, head_dim / 2]
  const float* sin;
  int rows;
  int q_heads;
  int k_heads;
  int head_dim;
  float eps;
};
void qk_norm_rope(const QkNormRope& args, cudaStream_t stream);

}  // namespace zimage_rt
