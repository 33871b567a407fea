#pragma once

#include "device/dtype.h"
#include "device/matrix.h"

namespace zimage_rt {

// out [rows, weight.out] = alpha * (x [rows, weight.in] · weight) + bias; row-major. Sums are fp32,
// those of int8 are exact.
struct LinearArgs {
  const void* x = nullptr;       // in the dtype of a 16-bit weight
  QuantizedRows quantized = {};  // x of an 8-bit weight: in its dtype and rotation
  Matrix weight;
  const float* bias = nullptr;  // [weight.out]; needs a 16-bit weight and an fp32 output
  void* out;
  DType out_type;
  int rows;
  float alpha = 1.0f;
};

}  // namespace zimage_rt
