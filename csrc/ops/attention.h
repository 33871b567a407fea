#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "device/dtype.h"

namespace zimage_rt {

// Softmax(q kᵀ / sqrt(head_dim)) v for batch sequences of the same length. Element (b, t, head, d)
// of q, k and v lies at b * batch_stride + t * token_stride + head * head_dim + d, of out likewise.
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

// Attention by cuDNN where that is installed and fastest (Hopper and later), by our own kernel
// everywhere else.
class Attention {
 public:
  // `cudnn`: path or name of libcudnn; empty for our own kernel alone.
  explicit Attention(const std::string& cudnn);
  ~Attention();

  // The first call for a shape builds a plan, which must happen outside of a graph capture.
  void run(const AttentionArgs& args, cudaStream_t stream);

 private:
  class Cudnn;
  std::unique_ptr<Cudnn> cudnn_;
};

}  // namespace zimage_rt
