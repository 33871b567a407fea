#pragma once

#include "device/dtype.h"

namespace zimage_rt {

// The storage order of a weight matrix, row-major: [in, out] or [out, in].
enum class Layout { kInOut, kOutIn };

// A weight matrix on the device, for products x [rows, in] · matrix -> [rows, out].
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kBFloat16;
  Layout layout = Layout::kInOut;
  int in = 0;
  int out = 0;
  const float* scales = nullptr;  // [out], of 8-bit data; null for 16-bit data
};

}  // namespace zimage_rt
