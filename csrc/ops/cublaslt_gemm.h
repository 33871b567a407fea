#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "ops/linear_args.h"

namespace zimage_rt {

// Matrix products by cuBLASLt. The first product of a shape times the library's candidates and
// keeps the fastest, in memory and in `cache_file`, for this GPU and library version. That must not
// happen during a graph capture.
class CublasLtGemm {
 public:
  // `library`: path or name of libcublasLt. `cache_file`: empty for none; one that cannot be read
  // or written is ignored.
  CublasLtGemm(const std::string& library, std::string cache_file);
  ~CublasLtGemm();

  // Takes 16-bit weights of either layout.
  void run(const LinearArgs& args, cudaStream_t stream);
  std::size_t workspace_bytes() const;
  // Writes newly timed algorithms to the cache file, atomically.
  void save_cache();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace zimage_rt
