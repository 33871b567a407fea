#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/dtype.h"

namespace zimage_rt {

// Attention without a matrix of scores in memory, in fp16 or bf16, on any GPU from sm_80:
//   out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h']) v[b, j, h'],
// h' = h / (heads / kv_heads), over all keys j, or over j <= i if `causal`.
//
// Strides count elements: (b, t, h, d) is data[b * batch_stride + t * token_stride + h * head_dim +
// d], so q, k and v may be column ranges of one packed product. Addresses and strides are multiples
// of 16 bytes. `out` overlaps no input.
struct FlashAttention {
  struct Input {
    const void* data = nullptr;
    std::int64_t token_stride = 0;
    std::int64_t batch_stride = 0;
  };
  struct Output {
    void* data = nullptr;
    std::int64_t token_stride = 0;
    std::int64_t batch_stride = 0;
  };

  Input q;     // [batch, queries, heads, head_dim]
  Input k;     // [batch, keys, kv_heads, head_dim]
  Input v;     // [batch, keys, kv_heads, head_dim]
  Output out;  // [batch, queries, heads, head_dim]
  int batch = 1;
  int queries = 0;
  int keys = 0;  // = queries if causal
  int heads = 0;
  int kv_heads = 0;  // divides heads
  int head_dim = 0;  // 64 or 128
  float scale = 0.0f;
  bool causal = false;
  DType dtype = DType::kBFloat16;
  int query_tile = 0;  // queries per block: 64, 128, or 0 to choose by the amount of work
};

// Throws std::invalid_argument for arguments it does not serve. Allocates nothing, may be captured
// in a graph, and gives the same bytes in every run.
void flash_attention(const FlashAttention& args, cudaStream_t stream);

}  // namespace zimage_rt
