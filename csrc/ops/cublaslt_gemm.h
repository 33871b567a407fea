#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "device/dtype.h"

namespace zimage_rt {

// out [m, n] = alpha * a [m, k] · weight [k, n] + bias [n]: row-major, fp32 sums. A turned weight
// lies as [n, k].
struct GemmArgs {
  const void* a;
  const void* weight;
  const float* bias = nullptr;  // with fp32 out only
  void* out;
  DType type;  // of a and weight: fp16 or bf16
  DType out_type;
  int m;
  int n;
  int k;
  float alpha = 1.0f;
  bool turned = false;
};

// A projection to fp32 with a bias.
inline GemmArgs biased_gemm(const void* a, const void* weight, const float* bias, float* out,
                            DType type, int m, int n, int k) {
  GemmArgs args{};
  args.a = a, args.weight = weight, args.bias = bias, args.out = out;
  args.type = type, args.out_type = DType::kFloat32;
  args.m = m, args.n = n, args.k = k;
  return args;
}

// Matrix products by cuBLASLt. The first product of a shape times the library's candidates and
// remembers the fastest, in memory and in `cache_file`, for this GPU and library version; that
// must happen outside of a graph capture.
class Gemm {
 public:
  // `library`: path or name of libcublasLt. `cache_file`: empty for none; one that cannot be read
  // or written is as good as none.
  Gemm(const std::string& library, std::string cache_file);
  ~Gemm();

  void run(const GemmArgs& args, cudaStream_t stream);
  std::size_t workspace_bytes() const;
  // Writes newly timed algorithms to the cache file, whole or not at all.
  void save_cache();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace zimage_rt
