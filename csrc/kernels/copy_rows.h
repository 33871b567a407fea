#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace zimage_rt {

// Several copies of fp32 numbers in one launch: the inputs of one step of the sampler loop, from
// the tables of all steps. `from` needs no alignment, `to` is 16-byte aligned.
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

// Sets rows [first, first + count) of every `stride` rows of x, fp32 [samples * stride, dim], to
// `row` [dim].
void fill_rows(float* x, const float* row, int samples, int stride, int first, int count, int dim,
               cudaStream_t stream);

}  // namespace zimage_rt
