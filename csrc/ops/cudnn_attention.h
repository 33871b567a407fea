#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "ops/attention_args.h"

namespace zimage_rt {

// Attention by cuDNN's scaled-dot-product graph.
class CudnnAttention {
 public:
  // `library`: path or name of libcudnn. Null if it is empty, or on devices before Hopper, where
  // cuDNN is not faster than our own kernel. Throws CudaError, or std::runtime_error if the library
  // cannot be opened.
  static std::unique_ptr<CudnnAttention> open(const std::string& library);
  ~CudnnAttention();

  // The first call of a shape builds a plan, which must not happen during a graph capture.
  void run(const AttentionArgs& args, cudaStream_t stream);

 private:
  class State;
  explicit CudnnAttention(const std::string& library);
  std::unique_ptr<State> state_;
};

}  // namespace zimage_rt
