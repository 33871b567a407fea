#pragma once

#include <cuda.h>

#include "device/dtype.h"

namespace zimage_rt {

constexpr int kTensorMapRowBytes = 128;  // of a box: the widest swizzle

// A tensor of three axes, the innermost first, and a box of it.
struct TensorAxes {
  cuuint64_t size[3];
  cuuint64_t stride[2];  // bytes, of the second and the third axis
  cuuint32_t box[3];
};

// The TMA descriptor of such a tensor; boxes have the 128-byte swizzle.
CUtensorMap encode_tensor_map(const void* data, DType type, const TensorAxes& axes);

// The TMA descriptor of a row-major matrix. A load copies `box_rows` rows of `boxes` neighbouring
// strips of 128 bytes, which are consecutive in shared memory.
CUtensorMap tensor_map(const void* data, DType type, int rows, int columns, int box_rows,
                       int boxes);

}  // namespace zimage_rt
