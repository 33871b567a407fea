#pragma once

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

// out [rows, weight.out] = alpha * (x [rows, weight.in] · weight) + bias; row-major, fp32 sums.
struct LinearArgs {
  const void* x;  // in the dtype of a 16-bit weight
  Matrix weight;
  const float* bias = nullptr;  // [weight.out]; needs an fp32 output
  void* out;
  DType out_type;
  int rows;
  float alpha = 1.0f;
};

}  // namespace zimage_rt
