#pragma once

#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// softmax(q kᵀ / sqrt(head_dim)) v for `batch` sequences of the same length. Element (b, t, head,
// d) of q, k and v is at b * batch_stride + t * token_stride + head * head_dim + d, of out
// likewise.
struct AttentionArgs {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  DType type;
  int batch;
  int tokens;
  int heads;
  int kv_heads;  // divides heads
  int head_dim;
  std::int64_t token_stride;
  std::int64_t batch_stride;
  std::int64_t out_token_stride;
  std::int64_t out_batch_stride;
  bool causal = false;
};

}  // namespace zimage_rt
