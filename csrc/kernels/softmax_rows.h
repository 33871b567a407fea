#pragma once

#include <cuda_runtime_api.h>

#include "device/dtype.h"

namespace zimage_rt {

// out [rows, stride] = scale * 2^x / (the sum of 2^x over a row's first `columns`); zeros in the
// columns after those. Scores are multiplied by log2(e) before, in the product that makes them.
struct SoftmaxRows {
  const float* x;  // [rows, stride], 16-byte aligned
  void* out;       // not x
  DType dtype;
  int rows;
  int columns;  // at least 1
  int stride;   // a multiple of 8
  float scale = 1.0f;
};
void softmax_rows(const SoftmaxRows& args, cudaStream_t stream);

}  // namespace zimage_rt
