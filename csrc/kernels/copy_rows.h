#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace zimage_rt {

// Several copies of fp32 numbers in one launch: what a step of the sampler loop reads, out of the
// tables of all steps. `from` may start at any number, `to` is 16-byte aligned.
struct CopyRows {
  static constexpr int kMost = 6;
  struct Part {
    const float* from;
    float* to;
    std::size_t count;
  };
  Part parts[kMost];
  int count = 0;

  void add(const float* from, float* to, std::size_t numbers) {
    parts[count++] = {.from = from, .to = to, .count = numbers};
  }
};
void copy_rows(const CopyRows& args, cudaStream_t stream);

}  // namespace zimage_rt
